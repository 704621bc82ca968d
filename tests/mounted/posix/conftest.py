"""The filesystems that the tables of this folder run on, and the users who call.

Tables run on cowfs, and as root also on tmpfs and ext4 (on a loop device): a row that fails on the
kernel's own filesystems is wrong. Without root no process can become another user, so tests that
need other users or device nodes are skipped, and say so.
"""

import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.conftest import Mounted, require_clean
from tests.mounted.posix.engine import (
    IS_ROOT,
    LAG_NS,
    OTHERS,
    SELF,
    TICK_S,
    Caller,
    Case,
    Filesystem,
    User,
)
from tests.sizes import HANG_SECONDS

COWFS_OPTIONS = ("-o", "allow_other,suid,dev") if IS_ROOT else ()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mount each filesystem once for the whole folder; skip its tests on a plain directory."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.mounted)
            item.add_marker(pytest.mark.needs_cowfs)
            item.add_marker(pytest.mark.xdist_group("posix-calls"))


@pytest.fixture(scope="package", params=["cowfs", "tmpfs", "ext4"] if IS_ROOT else ["cowfs"])
def filesystem(request: pytest.FixtureRequest) -> Iterator[Filesystem]:
    """A mounted filesystem that every user can reach."""
    # Not below tmp_path: every pytest that starts closes that to others.
    with tempfile.TemporaryDirectory(prefix="cowfs-posix-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        if request.param == "cowfs":
            mount = Mounted(folder, "512M", COWFS_OPTIONS)
            try:
                mount.start()
                yield Filesystem("cowfs", mount.path, 0.0, LAG_NS)
            finally:
                trouble = mount.close()
            assert trouble is None, trouble
            require_clean(mount.image)
            return
        root = folder / "mnt"
        root.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", "size=256m,mode=755", "none", str(root)]
        if request.param == "ext4":
            image = folder / "image"
            with open(image, "wb") as file:
                file.truncate(256 << 20)
            subprocess.run(
                ["mkfs.ext4", "-q", "-F", "-b", "4096", str(image)],
                check=True,
                timeout=HANG_SECONDS,
            )
            words = ["mount", "-t", "ext4", "-o", "loop", str(image), str(root)]
        subprocess.run(words, check=True, timeout=HANG_SECONDS)
        try:
            yield Filesystem(request.param, root, TICK_S, LAG_NS)
        finally:
            subprocess.run(["umount", "-l", str(root)], check=True, timeout=HANG_SECONDS)


@pytest.fixture(scope="package")
def callers(filesystem: Filesystem) -> Iterator[dict[User, Caller]]:
    """The processes of all users; they end, and close their files, before the unmount."""
    users = (SELF, *OTHERS) if IS_ROOT else (SELF,)
    started = {user: Caller(user) for user in users}
    try:
        yield started
    finally:
        for caller in started.values():
            caller.close()


@pytest.fixture
def case(filesystem: Filesystem, callers: dict[User, Caller]) -> Iterator[Case]:
    """An empty directory for one test, the working directory of all users."""
    folder = Path(tempfile.mkdtemp(dir=filesystem.root))
    folder.chmod(0o755)
    yield Case(filesystem, callers, folder)
    for caller in callers.values():
        caller.call("chdir", "/")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Count the assertions that held, and fail with all that did not, at once."""
    result = yield
    case = pyfuncitem.funcargs.get("case")
    if isinstance(case, Case):
        what = f"assertions about system calls on {case.filesystem.name}"
        pyfuncitem.user_properties.append(("count", (what, case.count)))
        if case.failures:
            pytest.fail(case.report(), pytrace=False)
    return result


@pytest.fixture
def users(case: Case) -> Case:
    """The case, for tests that need several users."""
    if not IS_ROOT:
        pytest.skip("needs root, to become other users")
    return case
