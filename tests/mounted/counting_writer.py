"""A program that counts up in a file, and notes after each write() how far it has come.

Usage: counting_writer.py FILE MAP HOW. MAP is a file of 8 bytes outside of the mount: it holds the
last number written, stored after write() returned. The number n is at 8 * (n mod SLOTS) of FILE.
HOW is `quiet` or `cut`: with `cut` a second thread truncates the file behind the numbers all the
time, and during a truncation the kernel sends no pages. Runs until it is killed.
"""

import mmap
import os
import struct
import sys
import threading

SLOTS = 100_000


def cut(file: int) -> None:
    """Truncate the file at changing places behind the numbers."""
    size = 8 * SLOTS
    while True:
        size = 8 * SLOTS + (size + 4097) % 50_000
        os.ftruncate(file, size)


def main() -> None:
    path, shared, how = sys.argv[1:]
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    with open(shared, "r+b") as stream:
        done = mmap.mmap(stream.fileno(), 8)
    if how == "cut":
        threading.Thread(target=cut, args=(file,), daemon=True).start()
    number = 0
    while True:
        number += 1
        os.pwrite(file, struct.pack("<Q", number), 8 * (number % SLOTS))
        done[:] = struct.pack("<Q", number)  # one copy of all 8 bytes


if __name__ == "__main__":
    main()
