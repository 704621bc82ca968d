"""Manual pages, made from the --help texts of the commands.

There is one page for each command (`cowfs.1`, `cowfs-snapshot-create.1`, `cowdu.1`) and one for the
helpers of mount(8). The help texts are the only source, so a page cannot differ from the program.
Pages are in the language of man(7): text is escaped, verbatim blocks of --help stay verbatim, and
verbatim blocks of commands alone become the examples.
"""

import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Iterator

import click

from cowfs import __version__
from cowfs.cli.completion import PROGRAMS
from cowfs.errors import CowfsError

DISTRIBUTION = "cowfs-image"
_VERBATIM = "\b"  # click: the paragraph below is not filled


def pages() -> dict[str, str]:
    """Make all pages.

    Returns:
        The text of each page by its file name, `cowfs.1` first.

    Raises:
        CowfsError: the package is not installed, so the modules of its programs are unknown.
    """
    found: dict[str, str] = {}
    for program in PROGRAMS:
        command = _command(program)
        root = click.Context(command, info_name=program, **command.context_settings)
        found.update(_pages_of(command, root))
    found.update(_helper_pages())
    return found


def _command(program: str) -> click.Command:
    """Find the command of an installed program by the package's entry points."""
    try:
        installed = importlib.metadata.distribution(DISTRIBUTION).entry_points
    except importlib.metadata.PackageNotFoundError:
        raise CowfsError("cowfs is not installed as a package; pip install it first") from None
    module = importlib.import_module(installed.select(name=program)[program].module)
    for value in vars(module).values():
        if (
            isinstance(value, click.Command)
            and value.callback is not None
            and inspect.unwrap(value.callback).__module__ == module.__name__
        ):
            return value
    raise CowfsError(f"the program {program} has no command")


def _pages_of(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    yield f"{_page_name(context)}.1", _page(command, context)
    for name, inner in _inner(command, context):
        yield from _pages_of(inner, click.Context(inner, info_name=name, parent=context))


def _inner(command: click.Command, context: click.Context) -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return []
    found = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
    return [(name, inner) for name, inner in found if inner is not None and not inner.hidden]


def _page_name(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")


def _page(command: click.Command, context: click.Context) -> str:
    name = _page_name(context)
    summary = command.get_short_help_str(limit=200).rstrip(".")
    text, examples = _split_help(inspect.cleandoc(command.help or ""))
    usage = _text(" ".join(command.collect_usage_pieces(context)))
    lines = [_title(name, 1), ".SH NAME", f"{_text(name)} \\- {_text(summary)}"]
    lines += [".SH SYNOPSIS", f".B {_text(context.command_path)}", usage]
    lines += [".SH DESCRIPTION", *_paragraphs(text)]
    inner = _inner(command, context)
    if inner:
        lines.append(".SH COMMANDS")
        for word, each in inner:
            lines += [".TP", f"\\fB{_text(word)}\\fR", _text(each.get_short_help_str(limit=200))]
    lines.append(".SH OPTIONS")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record is not None:
            lines += [".TP", f"\\fB{_text(record[0])}\\fR", _text(record[1]) or "\\&"]
    if examples:
        lines += [".SH EXAMPLES", *_paragraphs(examples)]
    epilog = command.epilog or context.find_root().command.epilog
    if epilog:
        lines += [".SH NOTES", *_paragraphs(epilog)]
    related = [f"{name}-{word}(1)" for word, _ in inner]
    if context.parent is not None:
        related.insert(0, f"{_page_name(context.parent)}(1)")
    else:
        related += [f"{each}(1)" for each in PROGRAMS if each != name]
    if name in ("cowfs-mount", "cowfs-umount"):
        related += ["mount.fuse.cowfs(8)", "fstab(5)"]
    return "\n".join([*lines, ".SH SEE ALSO", _text(", ".join(related)), ""])


def _helper_pages() -> Iterator[tuple[str, str]]:
    from cowfs.cli import mount_helper, mounting

    names = (mount_helper.MOUNT_HELPER, mount_helper.UMOUNT_HELPER)
    options = next(
        part
        for part in inspect.cleandoc(mounting.mount.help or "").split("\n\n")
        if part.startswith(f"{_VERBATIM}\n-o ")
    )
    lines = [_title(names[0], 8), ".SH NAME"]
    lines.append(
        f"{', '.join(map(_text, names))} \\- mount and unmount images of cowfs for mount(8)"
    )
    lines += [".SH SYNOPSIS", f".B {_text(mount_helper.MOUNT_USAGE)}", ".br"]
    lines.append(f".B {_text(mount_helper.UMOUNT_USAGE)}")
    lines += [".SH DESCRIPTION", *_paragraphs(inspect.cleandoc(mount_helper.__doc__ or ""))]
    lines += [".SH OPTIONS", *_paragraphs(options)]
    lines += [".SH SEE ALSO", "cowfs\\-mount(1), cowfs\\-umount(1), mount(8), umount(8), fstab(5)"]
    yield f"{names[0]}.8", "\n".join([*lines, ""])
    yield f"{names[1]}.8", f".so man8/{names[0]}.8\n"


def _title(name: str, section: int) -> str:
    # No date: the same version always makes the same page.
    return f'.TH "{_text(name.upper())}" "{section}" "" "cowfs {__version__}" "cowfs"'


def _split_help(text: str) -> tuple[str, str]:
    """Split a help text into the text without its examples, and the examples."""
    rest: list[str] = []
    examples: list[str] = []
    for part in text.split("\n\n"):
        lines = part.splitlines()
        is_example = lines[0] == _VERBATIM and all(
            line.split(" ")[0] in PROGRAMS for line in lines[1:]
        )
        (examples if is_example else rest).append(part)
    return "\n\n".join(rest), "\n\n".join(examples)


def _paragraphs(text: str) -> list[str]:
    """Format the paragraphs of a help text as lines of man(7)."""
    lines: list[str] = []
    for part in filter(None, text.split("\n\n")):
        lines.append(".PP")
        if part.startswith(f"{_VERBATIM}\n"):
            lines += [".nf", *map(_text, part.splitlines()[1:]), ".fi"]
        else:
            lines.append(_text(" ".join(part.split())))
    return lines


def _text(text: str) -> str:
    """Escape text so that man(7) shows it unchanged."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga")
    escaped = escaped.replace("^", "\\(ha").replace("~", "\\(ti").replace('"', "\\(dq")
    return re.sub(r"(?m)^(?=[.'])", r"\\&", escaped)
