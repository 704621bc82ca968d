"""Promises that the floors of the house stay floors: each folder imports only from lower floors.

The tables below are the rule (cowfs/DESIGN.md, "Floors of the house"). Every import in every file
under cowfs/ and tools/ is read, wherever in the file it stands; nothing is run. The second half of
this file breaks the rule on purpose, to show that breaking it is noticed.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

# From the lowest to the highest: a floor may import itself and the floors listed before it.
FLOORS = (
    "errors",
    "storage",
    "files",
    "history",
    "accounting",
    "care",
    "daemon",
    "api",
    "cli",
    "tools",
)

# Files directly in cowfs/, and the floor they count as.
TOP_LEVEL_FILES = {
    "__init__": "errors",
    "errors": "errors",
    "escapes": "errors",
    "api": "api",
    "__main__": "cli",
}

# The checker shares no code with what it checks: not the allocator, the trees or the volume.
CARE_MAY_IMPORT = (
    "cowfs.care",
    "cowfs.errors",
    "cowfs.escapes",
    "cowfs.storage.device",
    "cowfs.storage.format",
    "cowfs.storage.index_pages",
    "cowfs.files.items",
    "cowfs.files.acl",  # only the codec of two xattr values; no code of trees or volumes
    "cowfs.files.calls",  # the codec of what the log records
    "cowfs.storage.log_records",
    "cowfs.storage.overlay",  # a device, which says what became of the log
    "cowfs.history.records",  # the codecs of the catalog, as files.items has those of a tree
)

# Libraries that only some floors may import.
LIBRARY_FLOORS = {"pyfuse3": ("daemon",), "trio": ("daemon", "cli")}

# Libraries that only one file may import, because other work must come before the import.
LIBRARY_FILES = {"pyfuse3": "cowfs.daemon.fuse"}

# What the package itself may import: `cowfs.connect` loads cowfs.api only when it is used.
FRONT_DOOR = ("cowfs.__init__", "cowfs.api")

# Module names that say nothing about their contents.
NAMELESS = {"utils", "util", "common", "helpers", "helper", "types", "misc"}


def violations(package: Path, tools: Path) -> list[str]:
    """All breaches of the tables above, each as "file:line: what is wrong".

    Args:
        package: the folder of the package cowfs.
        tools: the folder that is installed as the package cowfs_tools.
    """
    found: list[str] = []
    modules = {
        **_modules(package, "cowfs"),
        **_modules(tools, "cowfs_tools"),
    }
    for module, file in modules.items():
        words = module.split(".")
        if NAMELESS.intersection(words):
            found.append(f"{file}:1: the name of {module} does not say what is inside")
        floor = _floor(module)
        if floor is None:
            found.append(f"{file}:1: {module} is on no floor")
            continue
        for line, target in dict.fromkeys(_imports(file, module, modules)):
            reason = _objection(floor, module, target)
            if reason is not None:
                found.append(f"{file}:{line}: {reason}")
    return found


def _modules(folder: Path, package_name: str) -> dict[str, Path]:
    """The files of a folder by the names under which they are imported."""
    modules = {}
    for file in sorted(folder.rglob("*.py")):
        words = [package_name, *file.relative_to(folder).with_suffix("").parts]
        if words[-1] == "__init__" and len(words) > 2:
            words.pop()
        modules[".".join(words)] = file
    return modules


def _floor(module: str) -> str | None:
    """The floor of a module of the project; None if it is on no floor."""
    words = module.split(".")
    if words[0] == "cowfs_tools":
        return "tools"
    if len(words) == 1:
        return TOP_LEVEL_FILES["__init__"]
    if len(words) == 2 and words[1] in TOP_LEVEL_FILES:
        return TOP_LEVEL_FILES[words[1]]
    # `errors` and `tools` are floors too, but neither is a folder of cowfs/.
    return words[1] if words[1] in FLOORS[1:-1] else None


def _objection(floor: str, module: str, target: str) -> str | None:
    """Why a module on `floor` may not import the module `target`; None if it may."""
    library = target.split(".")[0]
    if library in LIBRARY_FLOORS and floor not in LIBRARY_FLOORS[library]:
        return f"{floor} imports {target}: only {' and '.join(LIBRARY_FLOORS[library])} may"
    if module != LIBRARY_FILES.get(library, module):
        return f"{module} imports {target}: only {LIBRARY_FILES[library]} may"
    if library == "tools":
        return f"{floor} imports {target}: its name when installed is cowfs_tools"
    if library not in ("cowfs", "cowfs_tools"):
        return None
    target_floor = _floor(target)
    if target_floor is None:
        return f"{floor} imports {target}, which is on no floor"
    if (module, target.removesuffix(".Connection").removesuffix(".connect")) == FRONT_DOOR:
        return None
    if FLOORS.index(target_floor) > FLOORS.index(floor):
        return f"{floor} imports {target}, from the floor {target_floor} above it"
    if floor == "care" and not any(
        target == allowed or target.startswith(allowed + ".") for allowed in CARE_MAY_IMPORT
    ):
        return f"care imports {target}: the checker may only use {', '.join(CARE_MAY_IMPORT)}"
    return None


def _imports(file: Path, module: str, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and full module name of each import in a file, including those inside functions."""
    is_package = file.name == "__init__.py"
    package = module.removesuffix(".__init__").split(".")
    if not is_package:
        package = package[:-1]

    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            words = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*words, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                # `from cowfs import storage` gives a module, `from cowfs import __version__` a
                # name.
                inner = f"{source}.{alias.name}"
                is_module = inner in modules or any(
                    name.startswith(inner + ".") for name in modules
                )
                yield node.lineno, inner if is_module else source
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("__import__", "import_module", "importlib.import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            yield node.lineno, node.args[0].value


def test_layering_of_this_checkout_has_no_violation() -> None:
    """Promise: in every file a floor imports only from itself and the floors below it."""
    found = violations(CHECKOUT / "cowfs", CHECKOUT / "tools")
    assert not found, "\n" + "\n".join(found)


def test_layering_reads_every_folder_of_the_list() -> None:
    """Promise: the check reads every folder, so it cannot pass by looking at nothing."""
    for floor in set(FLOORS[1:-1]) - set(TOP_LEVEL_FILES):
        assert list((CHECKOUT / "cowfs" / floor).glob("*.py")), f"no file in cowfs/{floor}"
    assert list((CHECKOUT / "tools").glob("*.py")), "no file in tools"


# ------------------------------------------------------------------- broken on purpose


def _violations_of(folder: Path, files: dict[str, str]) -> list[str]:
    """The violations found in a small project that is sound apart from `files`."""
    sound = {
        "cowfs/__init__.py": "__version__ = '1'\n",
        "cowfs/errors.py": "import errno\n",
        "cowfs/storage/__init__.py": "",
        "cowfs/storage/format.py": "import struct\nfrom cowfs.errors import CorruptError\n",
        "cowfs/storage/spacemap.py": "from cowfs.storage.format import Pointer\n",
        "cowfs/files/items.py": "from ..storage.format import Pointer\n",
        "cowfs/history/catalog.py": "from cowfs.files import items\nimport cowfs.storage.format\n",
        "cowfs/care/check.py": "import cowfs.storage.format\nimport cowfs.files.items\n",
        "cowfs/daemon/fuse.py": "import pyfuse3\n",
        "cowfs/daemon/server.py": "import trio\nfrom cowfs.care import check\n",
        "cowfs/cli/main.py": "import trio\nfrom cowfs import __version__\nimport cowfs.daemon\n",
        "tools/cowdu.py": "from cowfs.history import catalog\nfrom . import cowdump\n",
        "tools/cowdump.py": "",
    }
    for name, text in (sound | files).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return violations(folder / "cowfs", folder / "tools")


def test_layering_of_a_sound_project_is_accepted(tmp_path: Path) -> None:
    """Promise: allowed imports are accepted, so the rejections below prove something."""
    assert _violations_of(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("cowfs/errors.py", "import cowfs.storage.format", "errors imports cowfs.storage.format"),
        ("cowfs/__init__.py", "from cowfs.cli.main import main", "errors imports cowfs.cli.main"),
        ("cowfs/storage/device.py", "from cowfs.files.items import ROOT_INO", "storage imports"),
        ("cowfs/storage/device.py", "from cowfs import files", "storage imports cowfs.files"),
        ("cowfs/storage/device.py", "from ..files import items", "imports cowfs.files.items"),
        ("cowfs/storage/device.py", "from .. import history", "storage imports cowfs.history"),
        ("cowfs/files/volume.py", "def f():\n    import cowfs.history.catalog", "files imports"),
        ("cowfs/history/drop.py", "from cowfs.daemon import server", "history imports"),
        ("cowfs/daemon/control.py", "from cowfs.cli.main import main", "daemon imports cowfs.cli"),
        ("cowfs/cli/df.py", "import cowfs_tools.cowdu", "from the floor tools"),
        ("cowfs/cli/df.py", "from tools import cowdu", "its name when installed is cowfs_tools"),
        ("cowfs/files/volume.py", "import pyfuse3", "only daemon may"),
        ("cowfs/daemon/loop.py", "import pyfuse3", "only cowfs.daemon.fuse may"),
        ("cowfs/cli/mount.py", "from pyfuse3 import asyncio", "only daemon may"),
        ("tools/cowdump.py", "import pyfuse3", "only daemon may"),
        ("cowfs/history/drop.py", "import trio", "only daemon and cli may"),
        (
            "cowfs/storage/device.py",
            "from trio.to_thread import run_sync",
            "only daemon and cli may",
        ),
        (
            "cowfs/files/volume.py",
            "import importlib\nimportlib.import_module('trio')",
            "imports trio",
        ),
        ("cowfs/files/volume.py", "m = __import__('pyfuse3')", "files imports pyfuse3"),
        ("cowfs/care/check.py", "from cowfs.storage import spacemap", "the checker may only use"),
        (
            "cowfs/care/check.py",
            "from cowfs.storage.spacemap import get",
            "the checker may only use",
        ),
        ("cowfs/care/check.py", "import cowfs.history.catalog", "the checker may only use"),
        ("cowfs/care/check.py", "import cowfs.storage", "the checker may only use"),
        ("cowfs/storage/utils.py", "", "does not say what is inside"),
        ("cowfs/common/words.py", "", "does not say what is inside"),
        ("cowfs/files/types.py", "", "does not say what is inside"),
        ("tools/helpers.py", "", "does not say what is inside"),
        ("cowfs/attic/old.py", "", "is on no floor"),
        ("cowfs/loose.py", "", "is on no floor"),
    ],
)
def test_layering_broken_on_purpose_is_noticed(
    tmp_path: Path, file: str, text: str, complaint: str
) -> None:
    """Promise: each kind of breach is found, and the message names the file."""
    found = _violations_of(tmp_path, {file: text + "\n"})
    assert any(complaint in line and file in line for line in found), found
