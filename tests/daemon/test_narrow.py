"""Promises of directories for 32-bit programs: small counts stand for 64-bit positions."""

import os

from cowfs.daemon.narrow import NarrowListings, is_narrow


class Listing:
    """A directory of names with large positions, and the buffer that a listing fills."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.told: list[tuple[bytes, int]] = []

    def reply(self, token: object, name: bytes, attributes: object, cookie: int) -> bool:
        if len(self.told) == self.room:
            return False
        self.told.append((name, cookie))
        return True


def test_listing_goes_on_from_every_count() -> None:
    """Promise: a listing goes on from any count that it gave, with the names after it."""
    cookies = [(1 << 62) + 1000 * number for number in range(50)]
    listing = Listing(room=7)
    listings = NarrowListings(1 << 63, listing.reply)
    listings._is_narrow, listings._pid, listings._asked_ns = True, 77, 1 << 63
    handle = listings.open(5, 77)
    assert handle is not None
    narrow = listings.get(handle)
    assert narrow is not None
    assert narrow.node == 5
    for start in (0, 7, 3, 14, 14, 0, 21, 28, 35, 42, 49, 50):
        listing.told = []
        after = narrow.seek(start)
        for cookie in cookies:
            if cookie > after and not narrow.reply(None, b"%d" % cookie, None, cookie):
                break
        end = min(50, start + 7)
        assert listing.told == [(b"%d" % cookies[count], count + 1) for count in range(start, end)]
    assert narrow.seek(1 << 40) == cookies[-1], "a count that was never given"
    assert listings.close(handle)
    assert listings.get(handle) is None
    assert not listings.close(handle)


def test_programs_that_are_not_32_bit_are_known() -> None:
    """Promise: this program is not 32-bit, and neither is a process that cannot be examined."""
    assert not is_narrow(os.getpid())
    assert not is_narrow(0)
    assert not is_narrow(1 << 22)
    assert not is_narrow(2)  # a kernel thread, or the process after init
