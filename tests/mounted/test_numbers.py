"""Promises about inode numbers, st_ino and d_ino, as backup programs, du and old programs need."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Mounted, json_of, mounted

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.opendir.restype = ctypes.c_void_p
LIBC.opendir.argtypes = [ctypes.c_char_p]
LIBC.readdir64.restype = ctypes.c_void_p
LIBC.readdir64.argtypes = LIBC.closedir.argtypes = [ctypes.c_void_p]

# Lists a directory as ls does, without a 32-bit C library, which may be missing: names by
# getdents64. It reports numbers and positions that do not fit into 32 bits.
OLD_PROGRAM = """
static int call(int number, int one, void *two, int three) {
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(one), "c"(two), "d"(three)
                     : "memory");
    return result;
}
static char names[700], text[300];
void _start(void) {
    int directory = call(5, (int)".", (void *)0200000, 0), length, at, size;
    while ((length = call(220, directory, names, sizeof names)) > 0)
        for (at = 0; at < length; at += *(unsigned short *)(names + at + 16)) {
            unsigned *number = (unsigned *)(names + at), *position = (unsigned *)(names + at + 8);
            char *name = names + at + 19;
            for (size = 0; name[size]; size++)
                text[size] = name[size];
            if (number[1] || position[1] || (int)position[0] < 0)
                text[size++] = '!';
            text[size++] = '\\n';
            call(4, 1, text, size);
        }
    call(1, length ? 1 : 0, 0, 0);
}
"""


class Entry(ctypes.Structure):
    """struct dirent64."""

    _fields_ = (
        ("ino", ctypes.c_uint64),
        ("position", ctypes.c_int64),
        ("length", ctypes.c_uint16),
        ("type", ctypes.c_uint8),
        ("name", ctypes.c_char * 256),
    )


def listed_numbers(directory: Path) -> dict[str, int]:
    """The d_ino that readdir gives for each name, also for `.` and `..`."""
    stream = LIBC.opendir(os.fsencode(directory))
    assert stream
    found = {}
    while place := LIBC.readdir64(stream):
        entry = Entry.from_address(place)
        found[os.fsdecode(entry.name)] = entry.ino
    LIBC.closedir(stream)
    return found


def numbers_below(top: Path) -> dict[str, int]:
    """st_ino by path of everything below `top`; readdir must give the same numbers."""
    found = {".": top.stat().st_ino}
    for directory, folders, files in os.walk(top):
        place = Path(directory)
        listed = listed_numbers(place)
        assert listed["."] == place.stat().st_ino
        for name in folders + files:
            number = found[str((place / name).relative_to(top))] = (place / name).lstat().st_ino
            assert listed[name] == number, place / name
            if name in folders:
                assert listed_numbers(place / name)[".."] == place.stat().st_ino
    return found


def automatic_snapshot(mount: Mounted) -> str:
    """The newest of the snapshots that a rollback made."""
    snapshots = json_of(mount.cowfs("snapshot", "list", mount.path, "--json"))["snapshots"]
    return str([each["name"] for each in snapshots if each["automatic"]][-1])


@pytest.fixture
def visible(tmp_path: Path) -> Iterator[Mounted]:
    """A mount whose root lists .snapshots."""
    with mounted(tmp_path / "cowfs", size="64M", mount_options=("-o", "snapshots=visible")) as made:
        yield made


def make_files(top: Path) -> None:
    (top / "folder" / "deeper").mkdir(parents=True)
    for name in ("one", "folder/two", "folder/deeper/three"):
        (top / name).write_text(name)
    os.link(top / "one", top / "folder" / "linked")


def test_numbers_of_live_files_are_small_and_outlive_rollback_and_undo(visible: Mounted) -> None:
    """Promise: st_ino fits into 32 bits, and every file keeps its number over rollback and undo."""
    make_files(visible.path)
    before = {k: v for k, v in numbers_below(visible.path).items() if ".snapshots" not in k}
    assert before["one"] == before["folder/linked"]
    assert max(before.values()) < 1 << 32
    snapshot = visible.snapshot("monday")
    (visible.path / "later").write_text("later")
    with_later = numbers_below(visible.path)
    for step in ("rollback", "undo", "remount"):
        if step == "rollback":
            visible.rollback("monday")
        elif step == "undo":
            assert visible.cowfs("undo", visible.path).returncode == 0
        else:
            visible.remount()
        found = numbers_below(visible.path)
        expected = before if step == "rollback" else with_later
        assert {k: found[k] for k in expected if ".snapshots/" not in k} == {
            k: v for k, v in expected.items() if ".snapshots/" not in k
        }, step
    assert snapshot.is_dir()


def test_no_number_is_shown_twice(visible: Mounted) -> None:
    """Promise: files of the live tree, of each snapshot and .snapshots differ in st_ino."""
    make_files(visible.path)
    visible.snapshot("monday")
    visible.snapshot("tuesday")
    visible.rollback("monday")
    found = numbers_below(visible.path)
    links = [path for path in found if path.endswith("linked")]
    assert len(links) == 4, found
    assert len(set(found.values())) == len(found) - len(links)
    assert listed_numbers(visible.path / ".snapshots")[".."] == visible.path.stat().st_ino
    assert found[".snapshots"] < 1 << 32, "the root could not be listed by old programs"


def test_du_and_tar_count_each_file_of_a_snapshot(visible: Mounted) -> None:
    """Promise: du and tar of everything do not take snapshot files for links to live ones."""
    make_files(visible.path)
    (visible.path / "large").write_bytes(os.urandom(1 << 20))
    os.link(visible.path / "large", visible.path / "large too")
    visible.snapshot("monday")
    total = subprocess.run(["du", "-sk", visible.path], capture_output=True, check=True).stdout
    assert 2048 <= int(total.split()[0]) < 3072
    made = subprocess.run(
        ["tar", "-cf", "-", "-C", visible.path, "."], capture_output=True, check=True
    ).stdout
    told = subprocess.run(["tar", "-tvf", "-"], input=made, capture_output=True, check=True).stdout
    links = [line.split(b" link to ") for line in told.splitlines() if b" link to " in line]
    assert len(links) == 4
    for name, target in links:
        assert (b".snapshots" in name) == (b".snapshots" in target)


def test_what_stays_open_over_a_rollback_is_a_file_of_the_snapshot(visible: Mounted) -> None:
    """Promise: open files, and directories above them, share no number with live files."""
    make_files(visible.path)
    visible.snapshot("monday")
    deep = visible.path / "folder" / "deeper" / "three"
    number = deep.stat().st_ino
    with open(deep) as stream:
        visible.rollback("monday")
        assert os.fstat(stream.fileno()).st_ino != number
        assert deep.stat().st_ino == number
        old = visible.path / ".snapshots" / automatic_snapshot(visible) / "folder"
        assert os.fstat(stream.fileno()).st_ino == (old / "deeper" / "three").stat().st_ino
        found = numbers_below(visible.path)
        assert len(set(found.values())) == len(found) - 3, found
        assert stream.read() == "folder/deeper/three"


if os.uname().machine == "x86_64":

    def test_32_bit_program_reads_directories(visible: Mounted, tmp_path: Path) -> None:
        """Promise: all names, numbers and positions of live directories fit into 32 bits."""
        source, program = tmp_path / "old.c", tmp_path / "old"
        source.write_text(OLD_PROGRAM)
        words = ["gcc", "-m32", "-O1", "-static", "-nostdlib", "-ffreestanding", "-fno-pic"]
        words += ["-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-no-pie"]
        subprocess.run([*words, "-o", program, source], check=True)
        names = {f"name {number}" for number in range(500)}
        for name in names:
            (visible.path / name).touch()
        visible.snapshot("monday")
        for _ in range(2):
            done = subprocess.run([program], cwd=visible.path, capture_output=True, text=True)
            assert done.returncode == 0, done
            lines = done.stdout.splitlines()
            assert len(lines) == len(set(lines))
            assert set(lines) == names | {".", "..", ".snapshots"}
            visible.rollback("monday")
