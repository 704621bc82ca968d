"""Promises that a C project builds on a mount as anywhere: autoconf, automake, make.

make decides by modification times, to the nanosecond, what it builds again.
"""

import os
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.mounted.programs import run
from tests.sizes import sized

pytestmark = [pytest.mark.mounted]

FILES = sized(12, 100)

CONFIGURE = """
AC_INIT([counting], [1.0])
AC_CONFIG_SRCDIR([source/main.c])
AC_CONFIG_AUX_DIR([aux])
AM_INIT_AUTOMAKE([foreign subdir-objects])
AC_CONFIG_HEADERS([config.h])
AC_PROG_CC
AM_PROG_AR
AC_PROG_RANLIB
AC_CHECK_HEADERS([stdlib.h unistd.h sys/stat.h nowhere.h])
AC_CHECK_FUNCS([mmap nowhere])
AC_CONFIG_FILES([Makefile])
AC_OUTPUT
"""

MAKEFILE = """
AM_CPPFLAGS = -I$(srcdir)/source
lib_LIBRARIES = libcounting.a
libcounting_a_SOURCES = {sources}
include_HEADERS = source/counting.h
bin_PROGRAMS = count
count_SOURCES = source/main.c
count_LDADD = libcounting.a
check_PROGRAMS = check-sum check-parts
check_sum_SOURCES = source/check_sum.c
check_sum_LDADD = libcounting.a
check_parts_SOURCES = source/check_parts.c
check_parts_LDADD = libcounting.a
TESTS = $(check_PROGRAMS)
dist_man_MANS = count.1
EXTRA_DIST = make-table
# A source that a program makes while building.
nodist_libcounting_a_SOURCES = table.c
BUILT_SOURCES = table.c
CLEANFILES = table.c
table.c: $(srcdir)/make-table
\t$(srcdir)/make-table >$@.new && mv -f $@.new $@
"""


def make_project(place: Path) -> None:
    """Write the sources of a program of 100 files: file n returns n and calls its neighbour."""
    (place / "source").mkdir(parents=True)
    (place / "aux").mkdir()
    files: dict[str, str] = {
        "configure.ac": CONFIGURE,
        "Makefile.am": MAKEFILE.format(
            sources=" ".join(f"source/part{number}.c" for number in range(FILES))
        ),
        "source/counting.h": "#ifndef COUNTING_H\n#define COUNTING_H\nextern const int table[];\n"
        + "".join(f"int part{number}(void);\n" for number in range(FILES))
        + "#endif\n",
        "count.1": ".TH COUNT 1\n",
        "make-table": "#!/bin/sh\necho '#include \"counting.h\"'\necho 'const int table[] = {'\n"
        + f"seq 0 {FILES - 1} | sed 's/$/,/'\necho '}};'\n",
    }
    for number in range(FILES):
        files[f"source/part{number}.c"] = (
            '#include "config.h"\n#include "counting.h"\n'
            f"int part{number}(void) {{ return table[{number}]; }}\n"
        )
    total = " + ".join(f"part{number}()" for number in range(FILES))
    files["source/main.c"] = (
        '#include <stdio.h>\n#include "counting.h"\n'
        f'int main(void) {{ printf("%d\\n", {total}); return 0; }}\n'
    )
    files["source/check_sum.c"] = (
        f'#include "counting.h"\nint main(void) {{ return {total} != {sum(range(FILES))}; }}\n'
    )
    files["source/check_parts.c"] = (
        '#include "counting.h"\n#include "config.h"\n'
        "#if !defined HAVE_MMAP || defined HAVE_NOWHERE || defined HAVE_NOWHERE_H\n"
        "#error configure found what is not there, or not what is\n#endif\n"
        "int main(void) { return part7() != 7; }\n"
    )
    for name, contents in files.items():
        (place / name).write_text(contents, encoding="ascii")
    (place / "make-table").chmod(0o755)


def make(build: Path, *words: str) -> str:
    """Run make with two jobs; returns its output."""
    return run("make", "-j2", *words, folder=build, CFLAGS="-O0", MAKEFLAGS="")


def times(build: Path) -> dict[str, int]:
    """The modification time of each file of a build."""
    return {
        str(path.relative_to(build)): path.stat().st_mtime_ns
        for path in build.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """The files that are new, gone or changed between two calls of `times`."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.fixture
def build(mount: Mounted) -> Path:
    """The build directory, beside the sources."""
    make_project(mount.path / "project")
    run("autoreconf", "--install", folder=mount.path / "project", WARNINGS="all,no-portability")
    place = mount.path / "build"
    place.mkdir()
    run("../project/configure", "--prefix=/usr", folder=place, CFLAGS="-O0")
    return place


def test_project_is_built_checked_and_installed(mount: Mounted, build: Path) -> None:
    """Promise: everything is built once, then only what changed, also after a remount."""
    source, target = mount.path / "project" / "source", mount.path / "installed"
    make(build)
    assert run(build / "count") == f"{sum(range(FILES))}\n"
    checked = make(build, "check")
    assert "# PASS:  2\n" in checked
    assert "# FAIL:  0\n" in checked
    make(build, "install", f"DESTDIR={target}")
    assert run(target / "usr" / "bin" / "count") == f"{sum(range(FILES))}\n"
    installed = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert installed == {
        "usr/bin/count",
        "usr/include/counting.h",
        "usr/lib/libcounting.a",
        "usr/share/man/man1/count.1",
    }
    # install sets its own times, but the contents are those that were built.
    assert (target / "usr" / "bin" / "count").read_bytes() == (build / "count").read_bytes()

    finished = times(build)
    assert len([name for name in finished if name.endswith(".o")]) == FILES + 4
    for _ in range(2):
        make(build)
        assert changed(finished, times(build)) == set(), "make did again what was done"
        mount.remount()

    # Touch the file right after the last check: make would miss it if the clock were behind.
    os.utime(source / f"part{FILES // 2}.c")
    make(build)
    again = times(build)
    # automake also writes the dependencies of an object anew.
    assert changed(finished, again) == {
        "libcounting.a",
        "count",
        f"source/part{FILES // 2}.o",
        f"source/.deps/part{FILES // 2}.Po",
    }
    (source / "counting.h").write_text(
        (source / "counting.h").read_text(encoding="ascii") + "/* */\n", encoding="ascii"
    )
    make(build)
    objects = {name for name in changed(again, times(build)) if name.endswith(".o")}
    assert len(objects) == FILES + 2  # all but the objects of two programs that only `check` builds
    make(build, "distclean")
    assert [path for path in build.rglob("*") if path.is_file()] == []


@pytest.mark.long
@pytest.mark.needs_cowfs
def test_rollback_brings_a_build_back_as_make_left_it(mount: Mounted, build: Path) -> None:
    """Promise C6: after a rollback make finds nothing to do, after an undo only what was new."""
    part = mount.path / "project" / "source" / "part3.c"
    make(build)
    finished = times(build)
    mount.snapshot("built")
    part.write_text(part.read_text(encoding="ascii").replace("[3]", "[4]"), encoding="ascii")
    make(build)
    other = times(build)
    assert run(build / "count") == f"{sum(range(FILES)) + 1}\n"
    make(build, "clean")

    mount.rollback("built")
    make(build)
    assert times(build) == finished
    assert run(build / "count") == f"{sum(range(FILES))}\n"
    assert mount.cowfs("undo", mount.path).returncode == 0
    assert not (build / "count").exists()
    make(build)
    assert run(build / "count") == f"{sum(range(FILES)) + 1}\n"
    assert times(build).keys() == other.keys()
