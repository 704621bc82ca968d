"""One process of mixed work on its own files, which knows every byte of them.

Run as a program: `mixed_worker.py DIRECTORY SEED SECONDS`. DIRECTORY is made, or emptied first if a
killed worker left files in it. At the end everything is compared once more, and a line of JSON
gives the number of operations and of bytes read and compared.

A difference ends the program with status 1 and a message. It knows nothing of cowfs.
"""

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

FILES_MAX = 60
FILE_BYTES_MAX = 700_000
XATTR = "user.worker"


class Worker:
    """The files of this worker, and the contents each must have."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.noise = self.random.randbytes(1 << 20)
        self.files: dict[str, bytearray] = {}
        self.xattrs: dict[str, bytes] = {}
        self.operations = 0
        self.compared_bytes = 0
        self.made = 0

    def run(self, seconds: float) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for number in range(3):
            (self.folder / f"d{number}").mkdir()
        steps = (
            [self.create] * 4
            + [self.overwrite] * 4
            + [self.compare] * 4
            + [self.append, self.truncate, self.rename, self.replace, self.delete, self.fsync]
            + [self.list, self.link, self.set_xattr]
        )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.random.choice(steps)()
            self.operations += 1
        self.compare_all()

    # --- steps ------------------------------------------------------------------------------------

    def create(self) -> None:
        if len(self.files) >= FILES_MAX:
            self.delete()
            return
        name = self.new_name()
        data = self.some(self.random.choice((0, 10, 1500, 4096, 30_000, FILE_BYTES_MAX // 2)))
        with open(self.folder / name, "xb") as file:
            file.write(data)
        self.files[name] = bytearray(data)

    def overwrite(self) -> None:
        if name := self.any_file():
            held = self.files[name]
            at = self.random.randrange(len(held) + 5000)
            data = self.some(self.random.randrange(1, 20_000))
            with open(self.folder / name, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), data, at)
            held.extend(bytes(max(0, at - len(held))))
            held[at : at + len(data)] = data

    def append(self) -> None:
        name = self.any_file()
        if name and len(self.files[name]) < FILE_BYTES_MAX:
            data = self.some(self.random.randrange(1, 50_000))
            with open(self.folder / name, "ab") as file:
                file.write(data)
            self.files[name] += data

    def truncate(self) -> None:
        if name := self.any_file():
            held = self.files[name]
            size = self.random.randrange(len(held) + 10_000)
            os.truncate(self.folder / name, size)
            del held[size:]
            held.extend(bytes(size - len(held)))

    def rename(self) -> None:
        if name := self.any_file():
            new = self.new_name()
            (self.folder / name).rename(self.folder / new)
            self.files[new] = self.files.pop(name)
            if name in self.xattrs:
                self.xattrs[new] = self.xattrs.pop(name)

    def replace(self) -> None:
        """Write a new file and rename it over an existing one."""
        if name := self.any_file():
            data = self.some(self.random.randrange(60_000))
            new = self.folder / "new"
            new.write_bytes(data)
            new.rename(self.folder / name)
            self.files[name] = bytearray(data)
            self.xattrs.pop(name, None)

    def delete(self) -> None:
        if name := self.any_file():
            (self.folder / name).unlink()
            del self.files[name]
            self.xattrs.pop(name, None)

    def link(self) -> None:
        """Make a second name with the same bytes; removing it leaves the first alone."""
        if name := self.any_file():
            second = self.folder / "second"
            os.link(self.folder / name, second)
            self.require(second.read_bytes() == self.files[name], f"second name of {name}")
            second.unlink()

    def set_xattr(self) -> None:
        if name := self.any_file():
            value = self.some(self.random.choice((1, 100, 3000)))
            os.setxattr(self.folder / name, XATTR, value)
            self.xattrs[name] = value

    def fsync(self) -> None:
        if name := self.any_file():
            descriptor = os.open(self.folder / name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    # --- comparing --------------------------------------------------------------------------------

    def compare(self) -> None:
        if name := self.any_file():
            self.compare_file(name)

    def compare_file(self, name: str) -> None:
        found = (self.folder / name).read_bytes()
        held = self.files[name]
        self.compared_bytes += len(found)
        if found != held:
            at = next(
                (index for index, (a, b) in enumerate(zip(found, held, strict=False)) if a != b),
                min(len(found), len(held)),
            )
            self.require(
                False,
                f"{name}: {len(found)} bytes, not {len(held)}; they differ from byte {at}",
            )
        if name in self.xattrs:
            value = os.getxattr(self.folder / name, XATTR)
            self.require(value == self.xattrs[name], f"{name}: xattr")

    def list(self) -> None:
        found = {
            str(Path(where, name).relative_to(self.folder))
            for where, _, names in os.walk(self.folder)
            for name in names
        }
        self.require(found == set(self.files), f"names: {found ^ set(self.files)}")

    def compare_all(self) -> None:
        self.list()
        for name in self.files:
            self.compare_file(name)

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            sys.exit(f"{self.folder}: after {self.operations} operations: {message}")

    # --- choosing ---------------------------------------------------------------------------------

    def any_file(self) -> str | None:
        return self.random.choice(list(self.files)) if self.files else None

    def new_name(self) -> str:
        self.made += 1
        directory = self.random.choice(("", "d0/", "d1/", "d2/"))
        return f"{directory}file-{self.made}"

    def some(self, size: int) -> bytes:
        at = self.random.randrange(len(self.noise) - size)
        return self.noise[at : at + size]


def main() -> None:
    folder, seed, seconds = sys.argv[1:]
    worker = Worker(Path(folder), int(seed))
    worker.run(float(seconds))
    print(
        json.dumps({"operations": worker.operations, "compared_bytes": worker.compared_bytes}),
        flush=True,
    )


if __name__ == "__main__":
    main()
