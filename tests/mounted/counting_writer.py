"""A program that counts up in a file, and says after each write() that returned how far it is.

Usage: counting_writer.py FILE MAP HOW. MAP is a file of 8 bytes outside of the mount: the number
that was last written, stored after write() returned. n is at 8 * (n mod SLOTS) of FILE. HOW is
`quiet`, or `cut`: then a second thread cuts the file behind the numbers all the time, during which the
kernel keeps its pages to itself. Runs until it is killed.
"""

import mmap
import os
import struct
import sys
import threading

SLOTS = 100_000


def cut(file: int) -> None:
    """Let the file end here and there behind the numbers."""
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
        done[:] = struct.pack("<Q", number)  # one copy of 8 bytes


if __name__ == "__main__":
    main()
