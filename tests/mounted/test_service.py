"""Promises to a service manager: it is told when the mount answers and when it stops.

The test runs the unit's own command lines, and listens at NOTIFY_SOCKET as systemd would.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import COMMANDS, run_command
from tests.conftest import is_mount_point, json_of, require_clean, require_success, unmount_lazily
from tests.sizes import HANG_SECONDS

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

QUIET_SECONDS = 0.3


class Service:
    """cowfs@data as its unit starts and stops it, and the messages it sends."""

    def __init__(self, folder: Path, address: str) -> None:
        self.image, self.place = folder / "disk.img", folder / "mnt"
        self.place.mkdir()
        require_success(run_command("mkfs", self.image, "--size", "64M"))
        require_success(run_command("integrate", "--prefix", folder / "prefix"))
        unit = (folder / "prefix/share/systemd/user/cowfs@.service").read_text()
        self._lines = dict(
            line.split("=", 1) for line in unit.splitlines() if line.startswith("Exec")
        )
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(HANG_SECONDS)
        self.address = address
        if address:
            self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.process: subprocess.Popen[str] | None = None

    def words(self, name: str) -> list[str]:
        """A command line of the unit, with the instance's settings filled in."""
        settings = {"IMAGE": self.image, "DIRECTORY": self.place, "OPTIONS": "commit=60"}
        text = self._lines[name].removeprefix("-")
        for variable, value in settings.items():
            text = text.replace(f"${{{variable}}}", str(value))
        return text.split()

    def start(self) -> int:
        environment = {**os.environ, "NOTIFY_SOCKET": self.address}
        self.process = subprocess.Popen(
            self.words("ExecStart"), env=environment, stderr=subprocess.PIPE, text=True
        )
        return self.process.pid

    def notice(self) -> dict[str, str]:
        """The next message, as names and values."""
        text = self.socket.recv(4096).decode()
        return dict(line.split("=", 1) for line in text.splitlines())

    def end(self) -> tuple[int, str]:
        """Wait for the end; returns the exit status and the log."""
        assert self.process is not None
        _, log = self.process.communicate(timeout=HANG_SECONDS)
        return self.process.returncode, log


@pytest.fixture(params=["a path", "abstract"])
def service(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    names = {"a path": str(tmp_path / "notify"), "abstract": f"@cowfs-test-{os.getpid()}"}
    service = Service(tmp_path, names[request.param])
    try:
        yield service
    finally:
        if service.process is not None and service.process.returncode is None:
            service.process.kill()
            service.process.communicate()
        service.socket.close()
        if is_mount_point(service.place):
            unmount_lazily(service.place)
    require_clean(service.image)


def test_service_is_ready_when_the_mount_answers_and_stops_in_a_clean_commit(
    service: Service,
) -> None:
    """Promise: READY=1 when files can be made, STOPPING=1 before the last commit, then exit 0."""
    service.start()
    ready = service.notice()
    assert ready.pop("READY") == "1"
    assert ready == {"STATUS": f"{service.image} is mounted on {service.place}"}
    assert is_mount_point(service.place), "ready before the mount was live"
    (service.place / "file").write_text("kept")
    subprocess.run(service.words("ExecStop"), check=True, timeout=HANG_SECONDS)
    stopping = service.notice()
    assert stopping["STOPPING"] == "1"
    assert "last commit" in stopping["STATUS"]
    assert service.end()[0] == 0
    assert json_of(run_command("info", service.image, "--json"))["clean"] is True


def test_service_that_is_busy_ends_by_sigterm_in_a_clean_commit(service: Service) -> None:
    """Promise: ExecStop is refused while a file is open; the SIGTERM after it ends cleanly."""
    pid = service.start()
    service.notice()
    with (service.place / "open").open("w") as file:
        file.write("kept")
        file.flush()
        stop = subprocess.run(service.words("ExecStop"), capture_output=True, text=True)
        assert stop.returncode == 1
        assert "busy" in stop.stderr
        os.kill(pid, signal.SIGTERM)
        assert service.notice()["STOPPING"] == "1"
        assert service.end()[0] == 0
    assert not is_mount_point(service.place)
    require_success(run_command("mount", service.image, service.place))
    assert (service.place / "open").read_text() == "kept"
    require_success(run_command("umount", service.place))


def test_service_starts_again_after_a_kill(service: Service) -> None:
    """Promise: Restart= works: the start clears away what the killed daemon left."""
    for _ in range(2):
        pid = service.start()
        assert service.notice()["READY"] == "1"
        os.kill(pid, signal.SIGKILL)
        service.end()
        assert is_mount_point(service.place)
    service.start()
    assert service.notice()["READY"] == "1"
    (service.place / "file").write_text("alive")
    subprocess.run(service.words("ExecStop"), check=True, timeout=HANG_SECONDS)
    assert service.notice()["STOPPING"] == "1"
    assert service.end()[0] == 0


def test_start_that_fails_is_never_ready(service: Service) -> None:
    """Promise: a failed start has an error status and sends no READY=1."""
    service.image.rename(service.image.with_suffix(".away"))
    service.start()
    code, log = service.end()
    service.image.with_suffix(".away").rename(service.image)
    assert code == 10
    assert "there is no image" in log
    service.socket.settimeout(QUIET_SECONDS)
    with pytest.raises(TimeoutError):
        service.notice()


@pytest.mark.parametrize(
    ("address", "said"),
    [("", False), ("vsock:2:1", True), ("/nobody/listens/here", True), ("@" + "x" * 200, True)],
)
def test_mount_lives_without_a_service_manager_that_listens(
    tmp_path: Path, address: str, said: bool
) -> None:
    """Promise: an address that leads nowhere costs a line in the log and nothing else."""
    program = (
        "import logging, os, sys; logging.basicConfig()\n"
        "from cowfs.daemon.notify import READY, Notifier\n"
        "notifier = Notifier.from_environment()\n"
        "notifier.tell(READY, 'two\\nlines')\n"
        "assert 'NOTIFY_SOCKET' not in os.environ\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NOTIFY_SOCKET": address},
        capture_output=True,
        text=True,
        check=True,
    )
    assert bool(done.stderr) == said, done.stderr
    assert "Traceback" not in done.stderr


def test_mount_in_the_background_tells_a_service_manager_nothing(tmp_path: Path) -> None:
    """Promise: only the process that was started as the service sends messages for it."""
    place, image = tmp_path / "mnt", tmp_path / "disk.img"
    place.mkdir()
    require_success(run_command("mkfs", image, "--size", "64M"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(QUIET_SECONDS)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        subprocess.run([COMMANDS / "cowfs", "mount", image, place], env=environment, check=True)
        require_success(run_command("umount", place))
        with pytest.raises(TimeoutError):
            listener.recv(100)
    require_clean(image)
