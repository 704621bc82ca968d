"""Promises about image files: the lock, short transfers, holes, and errors with words."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cowfs.errors import DeviceError, ImageError, ImageMissingError, LockedError
from cowfs.storage.device import FileDevice, create_file

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create_file(tmp_path / "disk.img", SIZE)
    return tmp_path / "disk.img"


def test_write_of_many_buffers_is_read_back_whole(path: Path) -> None:
    """Promise: a write of more buffers than the host takes at once is written whole, in order."""
    device = FileDevice(path, writable=True)
    parts = [bytes([number % 251]) * (1 + number % 3) for number in range(3000)]
    device.write(777, parts)
    device.flush()
    assert device.read(777, len(b"".join(parts))) == b"".join(parts)
    assert device.size_bytes == SIZE
    device.close()
    device.close()


def test_short_writes_of_the_host_are_continued(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a short write is repeated until all bytes are written, wherever it was cut."""
    device = FileDevice(path, writable=True)
    pwritev = os.pwritev
    parts = [bytes([number]) * 100 for number in range(20)]
    for most in (1, 99, 100, 101, 250):

        def short(fd: int, buffers: list[bytes], offset: int, most: int = most) -> int:
            return pwritev(fd, [b"".join(buffers)[:most]], offset)

        monkeypatch.setattr(os, "pwritev", short)
        device.write(most, parts)
        assert device.read(most, 2000) == b"".join(parts)
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(DeviceError, match="nothing was written"):
        device.write(0, parts)


def test_short_reads_of_the_host_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: a short read is repeated; only the end of the file is an error."""
    device = FileDevice(path, writable=True)
    data = os.urandom(5000)
    device.write(0, [data])
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 700), offset))
    assert device.read(0, 5000) == data
    with pytest.raises(DeviceError, match="is it truncated"):
        device.read(SIZE - 10, 11)
    with pytest.raises(DeviceError, match="is it truncated"):
        device.read(SIZE + 10, 1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_refusals_of_the_host_are_device_errors(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Promise C8: every failure of the host reaches the store, with the host's reason."""
    device = FileDevice(path, writable=True)

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    for name in ("pread", "pwritev", "fdatasync"):
        monkeypatch.setattr(os, name, refuse)
    calls = (lambda: device.read(0, 1), lambda: device.write(0, [b"x"]), device.flush)
    for call in calls:
        with pytest.raises(DeviceError, match=os.strerror(number)) as caught:
            call()
        assert caught.value.errno == errno.EIO


def test_second_writer_is_refused_and_told_who_has_it(path: Path) -> None:
    """Promise: two writers never share an image; readers are allowed."""
    code = (
        "import sys; from cowfs.storage.device import FileDevice\n"
        "device = FileDevice(sys.argv[1], writable=True)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(LockedError, match=f"process {other.pid}") as caught:
            FileDevice(path, writable=True)
        assert caught.value.errno == errno.EBUSY
        FileDevice(path, writable=False).close()
        other.communicate()
    FileDevice(path, writable=True).close()


def test_lock_ends_with_close_and_holds_inside_one_process(path: Path) -> None:
    """Promise: the lock belongs to the open image, not to the process."""
    device = FileDevice(path, writable=True)
    with pytest.raises(LockedError):
        FileDevice(path, writable=True)
    FileDevice(path, writable=False).close()  # closing a reader must not drop the writer's lock
    with pytest.raises(LockedError):
        FileDevice(path, writable=True)
    device.close()
    FileDevice(path, writable=True).close()


def test_discard_makes_a_hole_and_keeps_the_size(path: Path) -> None:
    """Promise: a discarded range gives its space back to the host."""
    device = FileDevice(path, writable=True)
    device.write(0, [os.urandom(SIZE)])
    device.flush()
    before = path.stat()
    device.discard(4096, SIZE // 2)
    device.flush()
    after = path.stat()
    assert after.st_size == before.st_size == SIZE
    assert after.st_blocks < before.st_blocks
    assert device.read(4096, SIZE // 2) == bytes(SIZE // 2)
    device.prefetch(0, SIZE)
    device.discard(SIZE * 2, 4096)  # a hint never fails
    assert path.stat().st_size == SIZE


def test_cached_read_is_whole_or_nothing(path: Path) -> None:
    """Promise: a read that must not wait gives all bytes or none."""
    device = FileDevice(path, writable=True)
    data = os.urandom(8192)
    device.write(0, [data])
    assert device.read_cached(0, 8192) in (data, None)
    assert device.read_cached(SIZE - 100, 200) is None


def test_what_is_no_image_is_refused_with_words(tmp_path: Path) -> None:
    """Promise: a missing file, a directory and a fifo get different errors, and nothing hangs."""
    with pytest.raises(ImageMissingError, match="cowfs mkfs"):
        FileDevice(tmp_path / "none", writable=False)
    with pytest.raises(ImageError, match="not a regular file"):
        FileDevice(tmp_path, writable=False)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="not a regular file"):
        FileDevice(tmp_path / "fifo", writable=True)
    with pytest.raises(ImageError, match="cannot make"):
        create_file(tmp_path / "no" / "such", SIZE)


def test_reader_cannot_write(path: Path) -> None:
    """Promise: a device opened for reading refuses writes."""
    device = FileDevice(path, writable=False)
    with pytest.raises(DeviceError):
        device.write(0, [b"x"])
    assert path.read_bytes()[:1] == b"\0"
