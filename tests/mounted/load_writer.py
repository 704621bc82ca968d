"""Changes files under a directory without end, and logs which changes were acknowledged as durable.

Run as a program: `load_writer.py DIRECTORY LOG WORKER SEED`. Each step changes one file, makes it
durable with fsync, and only then adds a line to LOG, which is outside of the filesystem under test.
When the filesystem goes away, as the tests intend, the program ends with status 0.

The contents of a file are a function of its name and its version, so the reader of the log needs
nothing else. `verify` is that reader: a file must be at the version that was acknowledged last, or
at the one in progress when the filesystem went away.
"""

import errno
import os
import random
import sys
from pathlib import Path

# The kernel's errors when the daemon of a FUSE mount is gone.
GONE = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV}

BLOCK_BYTES = 4096
REPLACED_FILES = 12
APPENDED_FILES = 3
OVERWRITTEN_FILES = 3
OVERWRITTEN_BLOCKS = 40


def contents_of(name: str, version: int) -> bytes:
    """The whole contents of a replaced file in one version: never empty, up to 300 KB."""
    generator = random.Random(f"{name} {version}")
    return generator.randbytes(generator.choice((1, 100, 4096, 10_000, 300_000)))


def record_of(name: str, version: int) -> bytes:
    """The bytes that one version appends to a growing file."""
    generator = random.Random(f"{name} {version}")
    return generator.randbytes(generator.randrange(1, 9000))


def block_of(name: str, block_index: int, version: int) -> bytes:
    """One block of a file that is overwritten in place; version 0 is how it is made."""
    return random.Random(f"{name} {block_index} {version}").randbytes(BLOCK_BYTES)


def sync_directory(folder: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Writer:
    """One load process: it alone changes the files that carry its worker number."""

    def __init__(self, folder: Path, log: Path, worker: int, seed: int) -> None:
        self.folder = folder
        self.log = log
        self.worker = worker
        self.generator = random.Random(seed)
        self.state = read_log(log)

    def run(self) -> None:
        """Change files until the filesystem goes away."""
        with open(self.log, "a", encoding="ascii", buffering=1) as acknowledged:
            while True:
                step = self.generator.choice(
                    (self.replace, self.replace, self.append, self.overwrite, self.delete)
                )
                for name, version in step():
                    self.state[name] = version
                    acknowledged.write(f"{name} {version}\n")

    def replace(self) -> list[tuple[str, int]]:
        """Write a new file, fsync it, rename it over the old one, and fsync the directory."""
        name = f"{self.worker}-replaced-{self.generator.randrange(REPLACED_FILES)}"
        version = abs(self.state.get(name, 0)) + 1
        new = self.folder / f"{name}.new"
        with open(new, "wb") as file:
            file.write(contents_of(name, version))
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.folder / name)
        sync_directory(self.folder)
        return [(name, version)]

    def delete(self) -> list[tuple[str, int]]:
        """Remove a replaced file; a negative version means that it must be gone."""
        name = f"{self.worker}-replaced-{self.generator.randrange(REPLACED_FILES)}"
        version = self.state.get(name, 0)
        if version <= 0:
            return []
        (self.folder / name).unlink()
        sync_directory(self.folder)
        return [(name, -(version + 1))]

    def append(self) -> list[tuple[str, int]]:
        """Add a record to a growing file."""
        name = f"{self.worker}-appended-{self.generator.randrange(APPENDED_FILES)}"
        version = self.state.get(name, 0) + 1
        file = self.folder / name
        # First cut off anything that a crash left behind the last acknowledged record.
        size = sum(len(record_of(name, number)) for number in range(1, version))
        with open(file, "ab") as stream:
            if stream.tell() != size:
                os.truncate(file, size)
            stream.write(record_of(name, version))
            stream.flush()
            os.fsync(stream.fileno())
        return [(name, version)]

    def overwrite(self) -> list[tuple[str, int]]:
        """Overwrite one block in the middle of a file."""
        name = f"{self.worker}-overwritten-{self.generator.randrange(OVERWRITTEN_FILES)}"
        file = self.folder / name
        if self.state.get(name, 0) == 0:
            with open(file, "wb") as stream:
                for block_index in range(OVERWRITTEN_BLOCKS):
                    stream.write(block_of(name, block_index, 0))
                stream.flush()
                os.fsync(stream.fileno())
            return [(name, 1)]
        block_index = self.generator.randrange(OVERWRITTEN_BLOCKS)
        key = f"{name}-{block_index}"
        version = self.state.get(key, 0) + 1
        with open(file, "r+b") as stream:
            stream.seek(block_index * BLOCK_BYTES)
            stream.write(block_of(name, block_index, version))
            stream.flush()
            os.fdatasync(stream.fileno())
        return [(key, version)]


def read_log(log: Path) -> dict[str, int]:
    """The last acknowledged version of each name; an incomplete line does not count."""
    state: dict[str, int] = {}
    if log.exists():
        for line in log.read_text(encoding="ascii").splitlines(keepends=True):
            if line.endswith("\n"):
                name, version = line.split()
                state[name] = int(version)
    return state


def verify(folder: Path, log: Path, worker: int) -> list[str]:
    """Compare the files of one worker with its log; returns the differences, in words.

    If a step that was in progress did happen, this adds it to the log: a state seen after a mount
    must not be undone by the next crash.
    """
    state = read_log(log)
    wrong: list[str] = []
    happened: dict[str, int] = {}
    _verify_replaced(folder, state, worker, wrong, happened)
    _verify_appended(folder, state, worker, wrong, happened)
    _verify_overwritten(folder, state, worker, wrong, happened)
    with open(log, "a", encoding="ascii") as stream:
        stream.writelines(f"{name} {version}\n" for name, version in happened.items())
    return wrong


def _verify_replaced(
    folder: Path, state: dict[str, int], worker: int, wrong: list[str], happened: dict[str, int]
) -> None:
    for number in range(REPLACED_FILES):
        name = f"{worker}-replaced-{number}"
        version = state.get(name, 0)
        next_version = abs(version) + 1
        file = folder / name
        found = file.read_bytes() if file.exists() else None
        if found == (contents_of(name, version) if version > 0 else None):
            continue
        if found == contents_of(name, next_version):
            happened[name] = next_version
        elif found is None:
            happened[name] = -next_version
        else:
            size = len(found)
            wrong.append(f"{name}: acknowledged at {version}, found {size} bytes of another thing")


def _verify_appended(
    folder: Path, state: dict[str, int], worker: int, wrong: list[str], happened: dict[str, int]
) -> None:
    for number in range(APPENDED_FILES):
        name = f"{worker}-appended-{number}"
        version = state.get(name, 0)
        expected = b"".join(record_of(name, step) for step in range(1, version + 1))
        file = folder / name
        found = file.read_bytes() if file.exists() else b""
        under_way = record_of(name, version + 1)
        rest = found[len(expected) :]
        if found[: len(expected)] != expected:
            wrong.append(f"{name}: {version} records acknowledged, not all in {len(found)} bytes")
        elif rest == under_way:
            happened[name] = version + 1
        elif not under_way.startswith(rest):
            wrong.append(f"{name}: after {version} records come bytes that nobody wrote")


def _verify_overwritten(
    folder: Path, state: dict[str, int], worker: int, wrong: list[str], happened: dict[str, int]
) -> None:
    for number in range(OVERWRITTEN_FILES):
        name = f"{worker}-overwritten-{number}"
        if state.get(name, 0) == 0:
            continue
        file = folder / name
        found = file.read_bytes() if file.exists() else b""
        if len(found) != OVERWRITTEN_BLOCKS * BLOCK_BYTES:
            wrong.append(f"{name}: {len(found)} bytes long")
            continue
        for block_index in range(OVERWRITTEN_BLOCKS):
            key = f"{name}-{block_index}"
            version = state.get(key, 0)
            block = found[block_index * BLOCK_BYTES : (block_index + 1) * BLOCK_BYTES]
            if block == block_of(name, block_index, version + 1):
                happened[key] = version + 1
            elif block != block_of(name, block_index, version):
                wrong.append(f"{name}: block {block_index} acknowledged at version {version}")


def main() -> None:
    """Change files until the filesystem goes away, which is the ordinary end."""
    folder, log, worker, seed = sys.argv[1:]
    try:
        Writer(Path(folder), Path(log), int(worker), int(seed)).run()
    except OSError as error:
        # Once the dead mount is cleared away, the path leads to the empty directory below it.
        if error.errno not in GONE and os.path.isdir(folder):
            raise


if __name__ == "__main__":
    main()
