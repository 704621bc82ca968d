"""Promises about users: permission bits separate them, and ordinary users can mount.

Their mounts go through the set-uid fusermount3, in a private mount namespace where /dev/fuse is
open to all.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import require_clean, require_success
from tests.mounted.machine import ANNA, BERT, NAMESPACES, Machine, machine

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs, NAMESPACES]


@pytest.fixture(scope="module")
def shared_machine() -> Iterator[Machine]:
    with machine() as made:
        yield made


@pytest.fixture
def folder(shared_machine: Machine, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder for any user; at the end mounts below it are gone and the image in it is clean."""
    folder = shared_machine.folder / request.node.name
    (folder / "mnt").mkdir(parents=True)
    folder.chmod(0o777)
    yield folder
    for _, mount_point, *_ in shared_machine.mounts():
        shared_machine.run("umount", "-i", "-l", mount_point)
    shared_machine.wait_until_empty()
    require_clean(folder / "disk.img")


def shell(run: Machine, user: int, program: str, *words: Path | int) -> str:
    """Run a user's shell program, which must succeed; returns its output."""
    return run.succeed("sh", "-ec", program, "sh", *map(str, words), user=user)


def refused(run: Machine, user: int, program: str, *words: Path | int) -> str:
    """Run a user's shell program, which must fail; returns its error output."""
    done = run.run("sh", "-ec", program, "sh", *map(str, words), user=user)
    assert done.returncode, done
    return done.stderr


def test_users_share_a_mount_of_root_by_permission_bits(
    shared_machine: Machine, folder: Path
) -> None:
    """Promise: with allow_other, modes and owners decide for each user, also after a remount."""
    run, place = shared_machine, folder / "mnt"
    require_success(run_command("mkfs", folder / "disk.img", "--size", "64M"))
    for remounted in (False, True):
        run.succeed(
            *("mount", "-t", "fuse.cowfs", folder / "disk.img", place),
            *("-o", "allow_other,x-helper"),
        )
        if not remounted:
            run.succeed("chmod", "1777", place)
            for user in (ANNA, BERT):
                shell(run, user, 'umask 022; mkdir "$1/$2"; echo own >"$1/$2/file"', place, user)
            shell(
                run,
                ANNA,
                'umask 077; echo secret >"$1/secret"; chmod 666 "$1/$2/file"',
                place,
                ANNA,
            )
        for user in (ANNA, BERT):
            owner = run.succeed("stat", "-c", "%u %g %A", place / str(user) / "file")
            assert owner.startswith(f"{user} {user} -rw-r")
        shell(run, BERT, 'echo added >>"$1/$2/file"', place, ANNA)
        for program in (
            'cat "$1/secret"',
            'rm -f "$1/secret"',
            'echo x >"$1/$2/new"',
            'chmod 777 "$1/secret"',
            'chown 60002 "$1/secret"',
            'ls "$1/.snapshots"',
        ):
            assert "ermi" in refused(run, BERT, program, place, ANNA), program
        assert shell(run, ANNA, 'cat "$1/secret"', place) == "secret\n"
        run.succeed("umount", place)
        assert not run.processes()


def test_mount_of_root_without_allow_other_is_closed_to_others(
    shared_machine: Machine, folder: Path
) -> None:
    """Promise: EACCES for everybody else, also for the root directory itself."""
    run, place = shared_machine, folder / "mnt"
    require_success(run_command("mkfs", folder / "disk.img", "--size", "64M"))
    run.succeed("mount", "-t", "fuse.cowfs", folder / "disk.img", place)
    run.succeed("chmod", "777", place)
    for program in ('ls "$1"', 'stat "$1/x"', 'touch "$1/x"'):
        assert "ermission denied" in refused(run, ANNA, program, place), program


def test_an_ordinary_user_mounts_works_and_unmounts(shared_machine: Machine, folder: Path) -> None:
    """Promise: without root: mount, snapshots, rollback, umount, and clearing a dead mount work."""
    run, place, image = shared_machine, folder / "home" / "data", folder / "disk.img"
    shell(run, ANNA, 'mkdir -p "$1"', place)

    def cowfs(*words: str | Path) -> str:
        return run.succeed("cowfs", *words, user=ANNA)

    cowfs("mkfs", image, "--size", "64M")
    cowfs("mount", image, place)
    options = run.mounts()[0][3].split(",")
    assert {f"user_id={ANNA}", "nosuid", "nodev", "default_permissions"} <= set(options)
    shell(run, ANNA, 'echo one >"$1/file"; ls -la "$1"', place)
    assert run.succeed("stat", "-c", "%u %g", place / "file", user=ANNA) == f"{ANNA} {ANNA}\n"
    assert "ermission denied" in refused(run, BERT, 'ls "$1"', place)
    assert "only that user and root" in refused(run, BERT, 'cowfs info "$1"', place)
    cowfs("snapshot", "create", place, "first")
    shell(run, ANNA, 'echo two >"$1/file"; cat "$1/.snapshots/first/file"', place)
    cowfs("rollback", place, "first")
    assert shell(run, ANNA, 'cat "$1/file"', place) == "one\n"
    assert json.loads(cowfs("info", place, "--json"))["mount_point"] == str(place)
    assert json.loads(run.succeed("cowfs", "info", place, "--json"))["mount_point"] == str(place)
    cowfs("umount", place)
    assert not run.mounts()
    assert not run.processes()

    cowfs("mount", image, place)
    shell(run, ANNA, 'echo three >"$1/file"', place)
    for words in (["fusermount3", "-u", place], ["umount", place]):
        run.succeed(*words, user=ANNA)
        assert not run.mounts()
        run.wait_until_empty()
        cowfs("mount", image, place)
        assert shell(run, ANNA, 'cat "$1/file"', place) == "three\n"
    # Kill the daemon: the next mount clears the dead mount away.
    daemon = run.processes()
    shell(run, ANNA, f"kill -9 {' '.join(map(str, daemon))}")
    run.wait_until_empty()
    assert refused(run, ANNA, 'ls "$1"', place), "somebody still serves"
    cowfs("mount", image, place)
    assert shell(run, ANNA, 'cat "$1/file"', place)
    # After SIGTERM the daemon itself unmounts.
    shell(run, ANNA, f"kill {' '.join(map(str, run.processes()))}")
    run.wait_until_empty()
    assert not run.mounts()


def test_an_ordinary_user_is_refused_what_is_not_his(shared_machine: Machine, folder: Path) -> None:
    """Promise: another's directory or image, or allow_other against fuse.conf, is refused."""
    run, place, image = shared_machine, folder / "home", folder / "disk.img"
    shell(run, ANNA, 'mkdir "$1"', place)
    run.succeed("cowfs", "mkfs", image, "--size", "64M", user=ANNA)
    image.chmod(0o600)
    assert "does not belong to you" in refused(
        run, ANNA, 'cowfs mount "$1" "$2"', image, folder / "mnt"
    )
    assert "not readable" in refused(
        run, BERT, 'mkdir "$2.b"; cowfs mount "$1" "$2.b"', image, place
    )
    assert "user_allow_other" in refused(
        run, ANNA, 'cowfs mount "$1" "$2" -o allow_other', image, place
    )
    assert not run.mounts()
    assert not run.processes()
    run.fuse_conf.write_text("user_allow_other\n")
    try:
        run.succeed("cowfs", "mount", image, place, "-o", "allow_other", user=ANNA)
        shell(run, ANNA, 'chmod 755 "$1"; echo open >"$1/file"', place)
        assert shell(run, BERT, 'cat "$1/file"', place) == "open\n"
        assert "ermission denied" in refused(run, BERT, 'echo x >"$1/file"', place)
        assert run.succeed("cat", place / "file") == "open\n"
        run.succeed("cowfs", "umount", place, user=ANNA)
    finally:
        run.fuse_conf.write_text("")


def test_a_mount_that_reads_keeps_the_writers_of_others_away(
    shared_machine: Machine, folder: Path
) -> None:
    """Promise: one image has readers or one writer, whichever users run them."""
    run, place, image = shared_machine, folder / "home", folder / "disk.img"
    shell(run, ANNA, 'mkdir "$1"', place)
    run.succeed("cowfs", "mkfs", image, "--size", "64M", user=ANNA)
    run.succeed("cowfs", "mount", image, folder / "mnt", "-o", "ro")
    assert "is mounted on" in refused(run, ANNA, 'cowfs mount "$1" "$2"', image, place)
    assert "in use" in refused(run, ANNA, 'cowfs snapshot create "$1" x', image)
    run.succeed("cowfs", "umount", folder / "mnt")
    run.succeed("cowfs", "mount", image, place, user=ANNA)
    assert "is mounted on" in refused(run, 0, 'cowfs mount "$1" "$2" -o ro', image, folder / "mnt")
    run.succeed("cowfs", "umount", place, user=ANNA)


def test_fstab_line_for_users_is_mounted_by_one(shared_machine: Machine, folder: Path) -> None:
    """Promise: with `user` in fstab an ordinary user mounts and unmounts by mount(8)."""
    run, place, image = shared_machine, folder / "home", folder / "disk.img"
    shell(run, ANNA, 'mkdir "$1"', place)
    run.succeed("cowfs", "mkfs", image, "--size", "64M", user=ANNA)
    run.fstab.write_text(f"{image} {place} fuse.cowfs noauto,user 0 0\n")
    try:
        run.succeed("mount", place, user=ANNA)
        assert f"user_id={ANNA}" in run.mounts()[0][3]
        shell(run, ANNA, 'echo kept >"$1/file"', place)
        run.succeed("umount", place, user=ANNA)
        run.wait_until_empty()
        assert not run.mounts()
        run.succeed("mount", place, user=ANNA)
        assert shell(run, ANNA, 'cat "$1/file"', place) == "kept\n"
    finally:
        run.fstab.write_text("")
