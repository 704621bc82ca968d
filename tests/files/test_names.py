"""Promises about directories: hash collisions, cookies that last, many entries."""

import errno
import random
import stat
from collections.abc import Callable

import pytest

from cowfs.care.check import check_image
from cowfs.errors import NoSpaceError
from cowfs.files.items import NAME_SLOTS, name_hash
from cowfs.files.namespace import RENAME_EXCHANGE
from cowfs.files.volume import Volume
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from tests.model.devices import MemoryDevice
from tests.sizes import sized

ROOT = 1


def make(total_blocks: int = 16384) -> tuple[MemoryDevice, Filesystem]:
    disk = MemoryDevice(total_blocks)
    make_filesystem(disk)
    return disk, open_filesystem(disk, writable=True)


def create(volume: Volume, name: bytes) -> int:
    return volume.create(ROOT, name, stat.S_IFREG | 0o644, 0, 0).ino


def unlink(volume: Volume, name: bytes) -> None:
    volume.reclaim(volume.unlink(ROOT, name).ino)


def listed(volume: Volume) -> dict[bytes, int]:
    return {entry.name: entry.ino for _, entry in volume.listing(ROOT)}


@pytest.fixture
def colliding(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], int]:
    """Makes names hash to their first letter only."""

    def first_letter(name: bytes, seed: int = 0) -> int:
        return (name[0] + 1) * NAME_SLOTS

    monkeypatch.setattr("cowfs.files.names.name_hash", first_letter)
    return first_letter


@pytest.mark.usefixtures("colliding")
def test_names_of_one_hash_live_side_by_side() -> None:
    """Promise: names whose hashes collide each keep their inode and their cookie."""
    choice = random.Random(1)
    _, filesystem = make()
    volume = filesystem.live
    model: dict[bytes, int] = {}
    cookies: dict[bytes, int] = {}
    for step in range(3000):
        name = choice.choice([b"a", b"b"]) + b"%d" % choice.randrange(14)
        if name in model and choice.random() < 0.6:
            if choice.random() < 0.5:
                unlink(volume, name)
                del model[name]
                del cookies[name]
            else:
                other = choice.choice(sorted(model))
                volume.rename(ROOT, name, ROOT, other, RENAME_EXCHANGE)
                model[name], model[other] = model[other], model[name]
        elif name in model:
            with pytest.raises(FileExistsError):
                create(volume, name)
        elif sum(known[:1] == name[:1] for known in model) == NAME_SLOTS:
            with pytest.raises(NoSpaceError):
                create(volume, name)
        else:
            model[name] = create(volume, name)
        if step % 50 == 0:
            filesystem.commit()
        assert listed(volume) == model
        for cookie, entry in volume.listing(ROOT):
            assert cookies.setdefault(entry.name, cookie) == cookie, "a cookie changed"
        for known, ino in model.items():
            assert volume.lookup(ROOT, known).ino == ino


@pytest.mark.usefixtures("colliding")
def test_seventeenth_name_of_one_hash_is_refused_and_changes_nothing() -> None:
    """Promise: a 17th name of one hash, which takes an attacker, is refused, and nothing else."""
    _, filesystem = make()
    volume = filesystem.live
    names = [b"a%02d" % number for number in range(NAME_SLOTS)]
    for name in names:
        create(volume, name)
    create(volume, b"b")
    inodes = volume.inodes.count
    for refused in (
        lambda: create(volume, b"a99"),
        lambda: volume.rename(ROOT, b"b", ROOT, b"a99"),
        lambda: volume.link(volume.lookup(ROOT, b"b").ino, ROOT, b"a99"),
        lambda: volume.symlink(ROOT, b"a99", b"target", 0, 0),
        lambda: volume.create(ROOT, b"a99", stat.S_IFDIR | 0o755, 0, 0),
    ):
        with pytest.raises(OSError, match=r".") as caught:
            refused()
        assert caught.value.errno == errno.ENOSPC
    assert volume.inodes.count == inodes, "an inode without a name was left behind"
    root = volume.get(ROOT)
    assert root.nlink == 2
    assert root.size_bytes == sum(map(len, names)) + 1
    assert volume.lookup(ROOT, b"b").nlink == 1
    assert volume.rename(ROOT, b"b", ROOT, b"a05") is not None  # needs no new slot
    filesystem.commit()
    assert sorted(listed(volume)) == names


def test_listing_over_changes_shows_what_stayed_once() -> None:
    """Promise: readdir continued by cookie lists each entry that stayed once, and misses none."""
    for seed in range(5):
        choice = random.Random(seed)
        _, filesystem = make()
        volume = filesystem.live
        there = {b"%d" % number for number in range(800)}
        for name in there:
            create(volume, name)
        stayed = set(there)
        seen: list[bytes] = []
        after = 0
        while True:
            part = []
            for cookie, entry in volume.listing(ROOT, after):
                part.append(entry.name)
                after = cookie
                if len(part) == 37:
                    break
            if not part:
                break
            seen += part
            for _ in range(20):
                name = choice.choice(sorted(there))
                unlink(volume, name)
                there.discard(name)
                stayed.discard(name)
                new = b"new%d" % choice.randrange(1 << 30)
                create(volume, new)
                there.add(new)
            if choice.random() < 0.3:
                filesystem.commit()
        assert len(seen) == len(set(seen)), "a name twice"
        assert stayed <= set(seen), "a name missing"


def test_cookie_of_a_name_that_was_removed_goes_on_behind_it() -> None:
    """Promise: a directory cookie stays valid after the entry it names was removed."""
    _, filesystem = make()
    volume = filesystem.live
    for number in range(100):
        create(volume, b"%d" % number)
    order = list(volume.listing(ROOT))
    for at in (0, 50, 99):
        cookie, entry = order[at]
        unlink(volume, entry.name)
        rest = [found.name for _, found in volume.listing(ROOT, cookie)]
        assert rest == [found.name for _, found in order[at + 1 :] if volume.find(ROOT, found.name)]


def test_hash_depends_on_the_seed_of_the_image_and_leaves_room_for_slots() -> None:
    """Promise: nobody can prepare collisions for an image whose seed he does not know."""
    for number in range(1000):
        name = b"name%d" % number
        assert name_hash(name, 1) != name_hash(name, 2)
        assert NAME_SLOTS <= name_hash(name, 1) < 1 << 63
        assert name_hash(name, 1) % NAME_SLOTS == 0


def test_directory_of_very_many_entries_keeps_them_all() -> None:
    """Promise: a directory of very many entries keeps them all."""
    count = sized(40_000, 100_000)
    disk, filesystem = make(65536)
    volume = filesystem.live
    inos = {}
    for number in range(count):
        name = b"entry-%d" % number
        inos[name] = create(volume, name)
    filesystem.commit()
    volume = open_filesystem(disk.crash(), writable=False).live
    assert listed(volume) == inos
    for number in range(0, count, 997):
        name = b"entry-%d" % number
        assert volume.lookup(ROOT, name).ino == inos[name]
    assert volume.get(ROOT).size_bytes == sum(map(len, inos))
    volume = filesystem.live
    for number in range(count):
        if number % 100:
            unlink(volume, b"entry-%d" % number)
    filesystem.commit()
    assert len(listed(volume)) == count // 100
    assert volume.tree.node_count < 60, "emptied leaves were not joined"
    assert check_image(disk).clean
