"""Checks the data blocks of extents: references and roles (I1, I5), and checksums (C9).

Snapshots share extents, so a block is read once for each distinct checksum that extents give it.
"""

import numpy as np
from xxhash import xxh3_64_digest

from cowfs.care.references import ROLE_DATA, References, parts_by_group
from cowfs.care.report import Findings
from cowfs.errors import DeviceError
from cowfs.files.items import Extent
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    DATA_CHECKSUM_BYTES,
    RING_SLOTS,
    NodeImage,
    Superblock,
    ring_blocks,
)


class DataCheck:
    """The data of one image.

    Args:
        references: gets one reference to each block of each extent.
        verify: whether `count` also compares the data with its checksums.

    Attributes:
        verified_blocks: data blocks whose checksum was computed so far.
    """

    def __init__(
        self,
        device: Device,
        superblock: Superblock,
        references: References,
        findings: Findings,
        *,
        verify: bool,
    ) -> None:
        self.verified_blocks = 0
        self._device = device
        self._seed = superblock.seed
        self._end_block = ring_blocks(superblock.total_blocks)[1]
        self._references = references
        self._findings = findings
        self._verify = verify

    def count(self, extents: list[tuple[int, int, Extent]], leaf: NodeImage) -> int:
        """Count the references of a leaf's extents.

        Args:
            extents: each as (inode number, offset in the file in blocks, extent).

        Returns:
            How many of the data blocks had no reference before.
        """
        new_blocks = 0
        for ino, offset, extent in extents:
            if not RING_SLOTS <= extent.block <= self._end_block - extent.count:
                self._findings.error(
                    "I5",
                    f"an extent leaves the image, found blocks {extent.block} to "
                    f"{extent.block + extent.count - 1}",
                    block=leaf.block,
                    ino=ino,
                )
                continue
            self._references.add(extent.block, extent.count)
            new, clash = self._references.mark(extent.block, extent.count, ROLE_DATA)
            new_blocks += new
            if clash:
                self._findings.error("I5", "data lies on a node", block=extent.block, ino=ino)
            if self._verify:
                self.verify(ino, offset, extent)
        return new_blocks

    def verify(self, ino: int, offset: int, extent: Extent, invariant: str = "C9") -> None:
        """Compare the data of an extent with its checksums; blocks already compared are skipped.

        Args:
            ino: the file, for findings.
            offset: of the extent in the file, in blocks.
            invariant: the promise that a wrong checksum breaks: "C9", or "I2" for an extent of a
                retained generation.
        """
        sums = np.frombuffer(extent.checksums, ">u8").astype(np.uint64)
        folded = sums ^ (sums >> np.uint64(32))
        tags = (folded ^ (folded >> np.uint64(16))).astype(np.uint16)
        tags[tags == 0] = 1
        pending = []
        for before, group, start, stop in parts_by_group(extent.block, extent.count):
            known = self._references.tags(group)[start:stop]
            wanted = tags[before : before + stop - start]
            if not np.array_equal(known, wanted):
                pending += (np.flatnonzero(known != wanted) + before).tolist()
                known[:] = wanted
        if not pending:
            return
        first, last = pending[0], pending[-1]
        try:
            data = self._device.read(
                (extent.block + first) * BLOCK_SIZE_BYTES, (last - first + 1) * BLOCK_SIZE_BYTES
            )
        except DeviceError:
            data = b""  # each block is then read by itself, to name those that cannot be read
        view = memoryview(data)
        for number in pending:
            start = (number - first) * BLOCK_SIZE_BYTES
            piece: memoryview | bytes = view[start : start + BLOCK_SIZE_BYTES]
            reason = "wrong data checksum"
            if not data:
                try:
                    piece = self._device.read(
                        (extent.block + number) * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES
                    )
                except DeviceError as error:
                    piece = b""
                    reason = f"data cannot be read ({error})"
            expected = extent.checksums[
                number * DATA_CHECKSUM_BYTES : (number + 1) * DATA_CHECKSUM_BYTES
            ]
            if not len(piece) or xxh3_64_digest(piece, self._seed) != expected:
                at = (offset + number) * BLOCK_SIZE_BYTES
                self._findings.error(
                    invariant,
                    f"{reason}, at byte {at} of the file",
                    block=extent.block + number,
                    ino=ino,
                    # A repair stops retaining earlier generations, so it removes this finding.
                    repairable=invariant == "I2",
                )
        self.verified_blocks += len(pending)
