"""Promises that the documents say what is there: links, names, commands, options, and lines of 100.

All Markdown files of the checkout are read. A command or a mount option has one home: exactly one
row of one table, so nobody writes two descriptions that drift apart. The second half of this file
breaks the rules on purpose, to show that breaking them is noticed.
"""

import ast
import functools
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cowfs.cli import manual
from cowfs.cli.completion import PROGRAMS
from cowfs.daemon.options import option_words
from cowfs_tools.cowdu.listing import COLUMNS

CHECKOUT = Path(__file__).resolve().parent.parent
LINE_CHARACTERS_MAX = 100
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "cowfs").rglob("*.md")])
DEVELOPING = CHECKOUT / "cowfs" / "docs" / "developing.md"
SPACE = CHECKOUT / "cowfs" / "docs" / "space.md"
CODE_FOLDERS = ("cowfs", "tools", "tests", "scripts")

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"#+ +(.+)")
SPAN = re.compile(r"`([^`]+)`")
PLACE = re.compile(r"(?:cowfs|tools|tests|scripts)/[\w./@-]*(?:::[\w.]+)?")  # file.py::Class.method
MEMBER = re.compile(r"([A-Z]\w+)\.(\w+)")  # Class.member


def name_of(document: Path) -> str:
    return str(document.relative_to(CHECKOUT))


# --- reading Markdown -----------------------------------------------------------------------------


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines outside of code blocks, with their numbers."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line


def without_code(text: str) -> str:
    """The prose as one text, without spans of code."""
    return SPAN.sub("", "\n".join(line for _, line in prose(text)))


def spans(text: str) -> list[str]:
    """The spans of code in the prose, including those that continue on the next line."""
    paragraphs = "\n".join(line for _, line in prose(text)).split("\n\n")
    return [" ".join(span.split()) for part in paragraphs for span in SPAN.findall(part)]


def anchors(text: str) -> set[str]:
    """The anchors of a document: headings in lower case, words joined by dashes, no punctuation."""
    found: set[str] = set()
    for _, line in prose(text):
        heading = HEADING.fullmatch(line)
        if heading is not None:
            slug = re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-")
            count = 0
            while (anchor := f"{slug}-{count}" if count else slug) in found:
                count += 1
            found.add(anchor)
    return found


def tables(text: str, first_title: str) -> Iterator[list[str]]:
    """The rows, as cells, of all tables whose first column has that title."""
    rows: list[list[str]] = []
    for _, line in [*prose(text), (0, "")]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows and rows[0][0] == first_title:
            yield from rows[2:]
        rows = []


# --- links ----------------------------------------------------------------------------------------


def broken_links(document: Path) -> list[str]:
    """The links of a document whose target file or heading does not exist."""
    broken = []
    for link in LINK.findall(without_code(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        known = anchors(target.read_text(encoding="utf-8")) if anchor and target.exists() else set()
        if not target.exists() or (anchor and anchor not in known):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    """Promise: no link between the documents is broken."""
    assert broken_links(document) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_page_is_reached_from_the_readme(document: Path) -> None:
    """Promise: a reader who begins at the README reaches every page by links."""
    reached: set[Path] = set()
    waiting = [CHECKOUT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = LINK.findall(without_code(page.read_text(encoding="utf-8")))
        paths = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
        waiting += [(page.parent / path).resolve() for path in paths if path]
    assert document in reached


# --- lines ----------------------------------------------------------------------------------------


def long_lines(text: str) -> list[int]:
    """The numbers of lines that are too long; tables and code cannot be wrapped."""
    return [
        number
        for number, line in prose(text)
        if len(line) > LINE_CHARACTERS_MAX and not line.startswith("|")
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_no_line_of_prose_is_longer_than_100(document: Path) -> None:
    """Promise: prose wraps at 100, so documents fit a terminal and their changes a review."""
    assert long_lines(document.read_text(encoding="utf-8")) == []


# --- names ----------------------------------------------------------------------------------------


@functools.cache
def members(file: Path) -> frozenset[str]:
    """The functions, classes, methods and constants of a file: `name`, `Class.name`."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        found.update(_names(node))
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                found.update(f"{node.name}.{name}" for name in _names(inner))
            for each in ast.walk(node):  # attributes of self
                if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
                    found.add(f"{node.name}.{each.attr}")
    return frozenset(found)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


@functools.cache
def code_files() -> tuple[Path, ...]:
    return tuple(
        file for folder in CODE_FOLDERS for file in sorted((CHECKOUT / folder).rglob("*.py"))
    )


def is_there(place: str) -> bool:
    """Whether a file, a folder, or a `file.py::name` of the checkout exists."""
    path, _, name = place.partition("::")
    file = CHECKOUT / path
    return name in members(file) if name and file.is_file() else not name and file.exists()


def missing_places(text: str) -> list[str]:
    """The places that a text names relative to the checkout and that do not exist."""
    return [span for span in spans(text) if PLACE.fullmatch(span) and not is_there(span)]


def missing_files(text: str) -> list[str]:
    """The missing Python files that a text names in short (`files/data.py`, `data.py`)."""
    named = [span for span in spans(text) if re.fullmatch(r"[\w/]+\.pyx?", span)]
    known = [f"/{file.relative_to(CHECKOUT)}" for file in code_files()]
    known += [f"/{file.relative_to(CHECKOUT)}" for file in (CHECKOUT / "cowfs").rglob("*.pyx")]
    return [span for span in named if not any(file.endswith(f"/{span}") for file in known)]


def missing_members(text: str) -> list[str]:
    """Each `Class.member` of a text whose class has no such member."""
    known = frozenset().union(*(members(file) for file in code_files()))
    return [span for span in spans(text) if MEMBER.fullmatch(span) and span not in known]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_file_and_function_that_is_named_exists(document: Path) -> None:
    """Promise: every file and function that a document names exists."""
    text = document.read_text(encoding="utf-8")
    assert missing_places(text) == []
    assert missing_files(text) == []
    assert missing_members(text) == []


def test_every_promise_and_invariant_has_a_place_and_a_test() -> None:
    """Promise: for each of C1 to C11 and I1 to I7 the developers' page names code and tests."""
    text = DEVELOPING.read_text(encoding="utf-8")
    design = (CHECKOUT / "cowfs" / "DESIGN.md").read_text(encoding="utf-8")
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    for title, letter, count in (("promise", "C", 11), ("invariant", "I", 7)):
        wanted = [f"{letter}{number + 1}" for number in range(count)]
        rows = list(tables(text, title))
        assert [row[0] for row in rows] == wanted
        for row in rows:
            for cell in row[1:]:
                assert any(PLACE.fullmatch(span) for span in SPAN.findall(cell)), row[0]
        stated = [row[0] for row in tables(design, "") if row[0].startswith(letter)]
        assert stated == wanted
    promised = [row[0] for row in tables(readme, "") if row[0].startswith("C")]
    assert promised == [f"C{number + 1}" for number in range(11)]


# --- commands and options -------------------------------------------------------------------------


def commands() -> list[str]:
    """Every command that does something itself, such as `cowfs snapshot create` or `cowdump`."""
    found = []
    waiting: list[tuple[click.Command, click.Context]] = []
    for program in PROGRAMS:
        command = manual._command(program)
        # With its settings: click keeps the help option that it makes first.
        root = click.Context(command, info_name=program, **command.context_settings)
        waiting.append((command, root))
    while waiting:
        command, context = waiting.pop()
        if not isinstance(command, click.Group):
            found.append(context.command_path)
            continue
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            waiting.append((inner, click.Context(inner, info_name=name, parent=context)))
    return sorted(found)


def homes_of_commands(texts: list[str]) -> Counter[str]:
    """How often each command begins a row of a table of commands. Scripts are left out."""
    named = []
    for row in (row for text in texts for row in tables(text, "command")):
        match = SPAN.fullmatch(row[0])
        assert match is not None, f"a row of a table of commands begins with one command: {row[0]}"
        named.append(match[1])
    known = sorted(commands(), key=len, reverse=True)
    counted: Counter[str] = Counter()
    for name in named:
        if not name.startswith("scripts/"):
            homes = [each for each in known if f"{name} ".startswith(f"{each} ")]
            counted[homes[0] if homes else name] += 1
    return counted


def homes_of_options(texts: list[str]) -> Counter[str]:
    """How often each mount option stands in the first column of a table of mount options."""
    found: Counter[str] = Counter()
    for text in texts:
        for row in tables(text, "`-o`"):
            found.update(re.sub(r"=[A-Z]+$", "=", word) for word in SPAN.findall(row[0]))
    return found


@functools.cache
def all_texts() -> tuple[str, ...]:
    return tuple(document.read_text(encoding="utf-8") for document in DOCUMENTS)


def test_every_command_is_described_in_one_row_of_one_page() -> None:
    """Promise: each command has one home, and no page describes a command that does not exist."""
    found = homes_of_commands([*all_texts()])
    assert found == Counter(commands())


def test_every_mount_option_is_described_in_one_row_of_one_page() -> None:
    """Promise: each mount option has one home, and no page describes one that does not exist."""
    assert homes_of_options([*all_texts()]) == Counter(option_words())


def test_every_column_of_cowdu_is_named_where_numbers_are_explained() -> None:
    """Promise: the page about numbers explains every column of cowdu."""
    named = {*spans(SPACE.read_text(encoding="utf-8"))}
    assert {*COLUMNS} <= named


# --- the package ----------------------------------------------------------------------------------


def test_every_document_of_the_package_is_installed_with_it() -> None:
    """Promise: the package contains its documents, and its README is that of the package index."""
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["project"]["readme"] == "README.md"
    package = CHECKOUT / "cowfs"
    installed = {
        file
        for pattern in settings["tool"]["setuptools"]["package-data"]["cowfs"]
        for file in package.glob(pattern)
    }
    assert {*package.rglob("*.md")} <= installed


# --- breaking the rules is noticed ----------------------------------------------------------------


def test_broken_links_are_noticed(tmp_path: Path) -> None:
    """Promise: a link to a missing file or heading is found."""
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# A title\n\n## What `code` is, and: why\n\n## A title\n")
    good = "[a](other.md) [b](other.md#what-code-is-and-why) [c](other.md#a-title-1) [d](#here)\n"
    page.write_text(f"# Here\n\n{good}`[no](link.md)`\n\n```\n[no](link.md)\n```\n")
    assert broken_links(page) == []
    page.write_text(
        "# Here\n[a](gone.md) [b](other.md#what-code-is) [c](#there) [d](http://e.org)\n"
    )
    assert broken_links(page) == ["gone.md", "other.md#what-code-is", "#there"]


def test_long_lines_are_noticed_outside_of_tables_and_code() -> None:
    """Promise: long lines of prose are found; tables and code, which cannot wrap, are not."""
    long = "word " * 21
    assert long_lines(f"short\n| {long} |\n```\n{long}\n```\n    {long}\n") == []
    assert long_lines(f"short\n{long}\n- {long}\n") == [2, 3]


def test_names_that_are_gone_are_noticed() -> None:
    """Promise: a document that names a removed file or function is found."""
    here = "tests/test_documents.py"
    text = f"`{here}` `{here}::anchors` `tests/` `documents` `test_documents.py` `Store.shadow`\n"
    assert missing_places(text) + missing_files(text) + missing_members(text) == []
    text = f"`tests/gone.py` `{here}::gone` `gone.py` `Store.gone` `store/gone.py`\n"
    assert missing_places(text) == ["tests/gone.py", f"{here}::gone"]
    assert missing_files(text) == ["tests/gone.py", "gone.py", "store/gone.py"]
    assert missing_members(text) == ["Store.gone"]


def test_commands_and_options_with_two_homes_or_none_are_noticed() -> None:
    """Promise: a command or option with a second description, or with none, is found."""
    one = (
        "| command | does |\n|---|---|\n| `cowfs mount IMG DIR` | mounts |\n"
        "| `scripts/run` | runs |\n"
    )
    assert homes_of_commands([one]) == {"cowfs mount": 1}
    gone = one.replace("cowfs mount", "cowfs mounted")
    assert homes_of_commands([one, one, gone]) == {"cowfs mount": 2, "cowfs mounted IMG DIR": 1}
    options = (
        "| `-o` | default |\n|---|---|\n| `ro`, `commit=SECONDS` | `rw` |\n| `log=stderr` | |\n"
    )
    assert homes_of_options([options, "| `-x` | |\n|---|---|\n| `rw` | |\n"]) == {
        "ro": 1,
        "commit=": 1,
        "log=stderr": 1,
    }
