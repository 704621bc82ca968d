"""Promises under the usual load programs for filesystems: fio, dbench and stress-ng.

Each program verifies what it reads; none may fail, and none may leave the image unclean.
"""

import os
import re
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.mounted.programs import SECONDS, run
from tests.sizes import sized

pytestmark = [
    pytest.mark.mounted,
]

# ------------------------------------------------------------------- fio

# Also pieces that are not whole blocks. Each job writes every place of its file once, in random
# order.
FIO_JOBS = f"""
[global]
rw=randwrite
size={sized(5, 12)}m
verify=crc32c
verify_fatal=1
do_verify=1
randrepeat=1
fallocate=none
group_reporting=1

[psync]
ioengine=psync
bs=4k
numjobs=2

[psync-odd]
ioengine=psync
bs=1536
size=3m

[psync-direct]
ioengine=psync
direct=1
bs=16k

[ring]
ioengine=io_uring
iodepth=16
bs=8k
fsync=100

[ring-direct]
ioengine=io_uring
direct=1
iodepth=16
bs=4k
numjobs=2

[mapped]
ioengine=mmap
bs=4k
fsync=200

[mixed]
rw=randrw
ioengine=psync
bs=4k
fdatasync=200

[space-first]
ioengine=psync
fallocate=native
bs=32k
"""


@pytest.mark.parametrize("options", [(), ("-o", "writeback")], ids=["plain", "writeback"])
def test_fio_reads_back_what_it_wrote_after_a_remount_too(
    mount: Mounted, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Promise: each kind of I/O reads what it wrote at random places, now and after a remount."""
    if options:
        mount.mount_options = options
        mount.remount()
    jobs = tmp_path / "jobs.fio"
    jobs.write_text(FIO_JOBS, encoding="ascii")
    words = ("fio", f"--directory={mount.path}", "--minimal", "--output", tmp_path / "out")
    run(*words, jobs, folder=tmp_path)
    files = sorted(mount.path.iterdir())
    assert len(files) == 10

    mount.remount()
    run(*words, "--verify_only", jobs, folder=tmp_path)

    # Prove that fio notices one changed byte in the middle of one file.
    with open(files[0], "r+b") as file:
        file.seek(2 << 20)
        (byte,) = file.read(1)
        file.seek(2 << 20)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(AssertionError, match="verify: bad"):
        run(*words, "--verify_only", jobs, folder=tmp_path)


# ------------------------------------------------------------------- dbench


def test_dbench_finds_no_error(mount: Mounted, tmp_path: Path) -> None:
    """Promise: the recorded calls of an office file server all end as they did when recorded."""
    seconds = max(3, round(SECONDS))
    script = "/usr/share/dbench/client.txt"
    output = run("dbench", "-t", str(seconds), "-c", script, "-D", mount.path, "2", folder=tmp_path)
    throughput = re.search(r"^Throughput ([0-9.]+) MB/sec", output, re.MULTILINE)
    assert throughput, output
    assert float(throughput[1]) > 0
    # Without a machine-wide semaphore, clients start a little apart.
    told = output.replace("failed to create barrier semaphore", "")
    assert not re.search(r"error|failed|expected", told, re.IGNORECASE), output
    left = [*mount.path.rglob("*")]
    assert all(path.is_dir() for path in left), left


# ------------------------------------------------------------------- stress-ng

LEFT_OUT = {
    "bind-mount": "mounts over the root directory of the machine",
    "binderfs": "mounts another filesystem",
    "dup": "is not about files on a disk, as are the next ones",
    "eventfd": "",
    "ioprio": "",
    "procfs": "reads the /proc of the machine",
    "fanotify": "watches every mount of the machine, and hangs where one of them is dead",
    "io": "calls sync(2) for all filesystems of the machine",
}
SKIPPED = {"verity", "fiemap"}  # FUSE supports neither


@pytest.mark.long
def test_stressors_of_file_systems_find_nothing_wrong(mount: Mounted, tmp_path: Path) -> None:
    """Promise: every stressor of stress-ng's class `filesystem` passes, verifying where it can."""
    log = tmp_path / "log"
    run(
        *("stress-ng", "--class", "filesystem", "--sequential", "1", "--verify"),
        *("--exclude", ",".join(LEFT_OUT), "--temp-path", mount.path, "--metrics-brief"),
        *(f"--timeout={max(1, round(SECONDS / 4))}s", "--log-file", log),
        *("--chdir-dirs=500", "--hdd-bytes=32M"),
        folder=tmp_path,
    )
    output = log.read_text(encoding="utf-8")
    told = [
        line for line in output.splitlines() if re.search(r"stress-ng: (fail|warn|error)", line)
    ]
    assert not told, output
    skipped = set(re.findall(r"\] (\S+): .*skipping stress", output))
    assert skipped <= SKIPPED, output
    ran = set(re.findall(r"metrc: \[\d+\] (\S+) +\d+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+", output))
    assert len(ran) > 30, output
    assert os.listdir(mount.path) == [], "something cannot be removed"
