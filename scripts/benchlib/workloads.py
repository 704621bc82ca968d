"""The client side of the benchmark: plain system calls in a process of its own.

    workloads.py STEP DIRECTORY PARAMETERS     (PARAMETERS is JSON)

runs one step and prints {"seconds": ..., "operations": ...} as JSON. It is started with `python -S
-E` and uses only the standard library. Names and offsets are made first; only the loop over the
system calls is timed. Every step is deterministic, so that all targets get the same calls.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import durable

FILE_BYTES = 4096
PIECE_BYTES = 1 << 20
DIRECTORY_COUNT = 20

Parameters = dict[str, Any]
Timing = tuple[float, int]


def _file_names(directory: str, count: int) -> list[str]:
    return [f"{directory}/tree/{i % DIRECTORY_COUNT:02d}/file-{i:06d}" for i in range(count)]


def make_tree(directory: str, parameters: Parameters) -> Timing:
    """Make the directories that `create` fills."""
    start_s = time.perf_counter()
    os.mkdir(f"{directory}/tree")
    for index in range(DIRECTORY_COUNT):
        os.mkdir(f"{directory}/tree/{index:02d}")
    return time.perf_counter() - start_s, DIRECTORY_COUNT


def create(directory: str, parameters: Parameters) -> Timing:
    names = _file_names(directory, parameters["files"])
    data = random.Random(1).randbytes(FILE_BYTES)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    start_s = time.perf_counter()
    for name in names:
        handle = os.open(name, flags, 0o644)
        os.write(handle, data)
        os.close(handle)
    return time.perf_counter() - start_s, len(names)


def stat_files(directory: str, parameters: Parameters) -> Timing:
    names = _file_names(directory, parameters["files"])
    call = os.stat
    start_s = time.perf_counter()
    for name in names:
        call(name)
    return time.perf_counter() - start_s, len(names)


def find(directory: str, parameters: Parameters) -> Timing:
    """Walk the tree and stat each entry, as find(1) does."""
    seen = 0
    start_s = time.perf_counter()
    waiting = [f"{directory}/tree"]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                seen += 1
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return time.perf_counter() - start_s, seen


def delete(directory: str, parameters: Parameters) -> Timing:
    names = _file_names(directory, parameters["files"])
    call = os.unlink
    start_s = time.perf_counter()
    for name in names:
        call(name)
    return time.perf_counter() - start_s, len(names)


def make_listing(directory: str, parameters: Parameters) -> Timing:
    """Make the directory that `readdir` lists."""
    count = parameters["entries"]
    start_s = time.perf_counter()
    os.mkdir(f"{directory}/listing")
    for index in range(count):
        os.close(os.open(f"{directory}/listing/entry-{index:06d}", os.O_CREAT | os.O_WRONLY, 0o644))
    return time.perf_counter() - start_s, count


def readdir(directory: str, parameters: Parameters) -> Timing:
    start_s = time.perf_counter()
    with os.scandir(f"{directory}/listing") as entries:
        seen = sum(1 for _ in entries)
    elapsed_s = time.perf_counter() - start_s
    if seen != parameters["entries"]:
        raise RuntimeError(f"listed {seen} of {parameters['entries']} entries")
    return elapsed_s, seen


def create_fsync(directory: str, parameters: Parameters) -> Timing:
    count = parameters["synced"]
    os.mkdir(f"{directory}/synced")
    data = random.Random(2).randbytes(FILE_BYTES)
    names = [f"{directory}/synced/file-{index:06d}" for index in range(count)]
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    start_s = time.perf_counter()
    for name in names:
        handle = os.open(name, flags, 0o644)
        os.write(handle, data)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - start_s, count


def _write_file(path: str, size_bytes: int) -> float:
    # Slices of one random buffer: they cannot be compressed, and no two are the same.
    noise = memoryview(random.Random(3).randbytes(2 * PIECE_BYTES))
    handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    start_s = time.perf_counter()
    for index in range(size_bytes // PIECE_BYTES):
        shift = index * 997 % PIECE_BYTES
        piece = noise[shift : shift + PIECE_BYTES]
        if os.write(handle, piece) != PIECE_BYTES:
            raise RuntimeError("short write")
    os.fsync(handle)
    elapsed_s = time.perf_counter() - start_s
    os.close(handle)
    return elapsed_s


def seq_write(directory: str, parameters: Parameters) -> Timing:
    size_bytes = parameters["sequential_bytes"]
    return _write_file(f"{directory}/sequential", size_bytes), size_bytes // PIECE_BYTES


def seq_read(directory: str, parameters: Parameters) -> Timing:
    buffer = bytearray(PIECE_BYTES)
    handle = os.open(f"{directory}/sequential", os.O_RDONLY)
    total_bytes = 0
    start_s = time.perf_counter()
    while got := os.readv(handle, [buffer]):
        total_bytes += got
    elapsed_s = time.perf_counter() - start_s
    os.close(handle)
    if total_bytes != parameters["sequential_bytes"]:
        raise RuntimeError(f"read {total_bytes} of {parameters['sequential_bytes']} bytes")
    return elapsed_s, total_bytes // PIECE_BYTES


def make_random(directory: str, parameters: Parameters) -> Timing:
    """Make the file for the random workloads, and remove the sequential one."""
    if os.path.exists(f"{directory}/sequential"):
        os.unlink(f"{directory}/sequential")
    size_bytes = parameters["random_bytes"]
    return _write_file(f"{directory}/random", size_bytes), size_bytes // PIECE_BYTES


def _offsets(parameters: Parameters, count: int, seed: int) -> list[int]:
    block_count = parameters["random_bytes"] // FILE_BYTES
    choose = random.Random(seed)
    return [choose.randrange(block_count) * FILE_BYTES for _ in range(count)]


def rand_write(directory: str, parameters: Parameters) -> Timing:
    offsets = _offsets(parameters, parameters["random_writes"], 4)
    data = random.Random(5).randbytes(FILE_BYTES)
    handle = os.open(f"{directory}/random", os.O_WRONLY)
    start_s = time.perf_counter()
    for offset in offsets:
        os.pwrite(handle, data, offset)
    os.fsync(handle)
    elapsed_s = time.perf_counter() - start_s
    os.close(handle)
    return elapsed_s, len(offsets)


def write_fsync(directory: str, parameters: Parameters) -> Timing:
    offsets = _offsets(parameters, parameters["synced"], 6)
    data = random.Random(7).randbytes(FILE_BYTES)
    handle = os.open(f"{directory}/random", os.O_WRONLY)
    start_s = time.perf_counter()
    for offset in offsets:
        os.pwrite(handle, data, offset)
        os.fsync(handle)
    elapsed_s = time.perf_counter() - start_s
    os.close(handle)
    return elapsed_s, len(offsets)


def rand_read(directory: str, parameters: Parameters) -> Timing:
    offsets = _offsets(parameters, parameters["random_reads"], 8)
    buffer = bytearray(FILE_BYTES)
    handle = os.open(f"{directory}/random", os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    start_s = time.perf_counter()
    for offset in offsets:
        if os.preadv(handle, [buffer], offset) != FILE_BYTES:
            raise RuntimeError("short read")
    elapsed_s = time.perf_counter() - start_s
    os.close(handle)
    return elapsed_s, len(offsets)


STEPS: dict[str, Callable[[str, Parameters], Timing]] = {
    step.__name__: step
    for step in (
        make_tree,
        create,
        stat_files,
        find,
        delete,
        make_listing,
        readdir,
        create_fsync,
        seq_write,
        seq_read,
        make_random,
        rand_write,
        write_fsync,
        rand_read,
    )
} | durable.STEPS


def main() -> int:
    step, directory, parameters = sys.argv[1:]
    seconds, operations = STEPS[step](directory, json.loads(parameters))
    print(json.dumps({"seconds": seconds, "operations": operations}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
