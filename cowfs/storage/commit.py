"""The commit: how one frozen transaction becomes the newest durable generation.

`begin` freezes the changes of the transaction, in the store's thread. `Commit.write` writes them to
the device, from any thread, while the next transaction goes on. `finish` releases what the
generation replaced, in the store's thread again. A failed write or flush ends all writing (C8): the
newest durable generation stays.

Keeps I2 and I3: writes go to blocks that no retained generation shows, and each block is written
once between two flushes. Repairs of bad copies are the exception; they go first (repairs.py).
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from cowfs.errors import CorruptError, DeviceError
from cowfs.storage.device import Buffer
from cowfs.storage.discards import Discard
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    FLAG_CLEAN,
    NODE_BLOCKS,
    Superblock,
    encode_node,
)
from cowfs.storage.map_index import FrozenMap
from cowfs.storage.node import Node
from cowfs.storage.store import Store
from cowfs.storage.superblock import write_slot


@dataclass(slots=True)
class Commit:
    """One generation on its way to the device.

    Attributes:
        generation: its number.
        nodes: its nodes, children before parents; the catalog's root is the last.
        data: its data, as (first block, buffers).
        map: its pages of the space map.
        superblock: complete only after `write`.
        release_limit: `finish` releases blocks that were freed in this generation or before.
        repairs: bad copies to rewrite, from `Repairs.take`.
        discard: under way at the freeze; it may discard blocks that this commit writes.
        done: set when `write` has ended, with or without an error.
        error: why the generation is not durable.
        finished: whether `finish` has done its work.
        written_bytes: without superblocks and repairs.
    """

    store: Store
    generation: int
    nodes: list[Node]
    data: list[tuple[int, list[Buffer]]]
    map: FrozenMap
    superblock: Superblock
    release_limit: int
    repairs: list[tuple[int, int, bytes]]
    discard: Discard | None
    done: threading.Event = field(default_factory=threading.Event)
    error: DeviceError | CorruptError | None = None
    finished: bool = False
    written_bytes: int = 0

    def write(self) -> None:
        """Make this generation durable. An error of the device is kept in `error`, not raised."""
        try:
            self._write()
        except (DeviceError, CorruptError) as error:
            self.error = error
        except BaseException as error:  # our bug: the generation is not durable either
            self.error = DeviceError(f"internal error: {error!r}")
            raise
        finally:
            self.done.set()

    def _write(self) -> None:
        device, seed = self.store.device, self.store.seed
        if self.discard is not None:
            self.discard.stop()
        self.store.repairs.write(device, self.repairs)
        image_id = self.superblock.image_id
        writes: list[tuple[int, Sequence[Buffer]]] = list(self.data)
        for node in self.nodes:
            image, node.checksum = encode_node(
                node.level,
                node.generation,
                node.block,
                node.owner,
                image_id,
                seed,
                node.keys,
                node.value_bytes(),
            )
            writes.append((node.block, [image]))
            if node.twin:
                writes.append((node.twin, [image]))
        for block, twin, page in self.map.encode(image_id, seed):
            writes.append((block, [page]))
            if twin:
                writes.append((twin, [page]))
        superblock = replace(
            self.superblock, catalog=self.nodes[-1].pointer(), space_map=self.map.top
        )
        for first, buffers in _gather(writes):
            device.write(first * BLOCK_SIZE_BYTES, buffers)
            self.written_bytes += sum(map(len, buffers))
        device.flush()
        # All that this generation points at is durable; no superblock points at it yet.
        write_slot(device, superblock)
        device.flush()
        # This is the commit point: from here on a mount shows this generation.
        self.superblock = superblock


def begin(
    store: Store,
    nodes: list[Node],
    *,
    catalog_nodes: int,
    next_root_id: int,
    clean: bool,
) -> Commit:
    """Freeze the open transaction and open the next.

    Args:
        nodes: all dirty nodes, with addresses, children before parents, the catalog's root last.
        catalog_nodes: number of nodes of the catalog.
        next_root_id: for the superblock.
        clean: mark the image as unmounted in order.

    Raises:
        NoSpaceError: the space map found no room for its pages; the transaction is lost.
    """
    generation = store.generation
    frozen = store.map.freeze(generation, store.place_map())
    limit = store.release_limit()
    place = store.superblock.log
    superblock = replace(
        store.superblock,
        generation=generation,
        flags=FLAG_CLEAN if clean else 0,
        committed_ns=time.time_ns(),
        oldest_retained=store.oldest_retained(),
        # An image may have wrong counts. They stay wrong, but in the range that decoding accepts.
        used_blocks=max(0, min(store.map.used_blocks, store.map.total_blocks)),
        catalog_nodes=max(1, min(catalog_nodes, store.map.total_blocks // NODE_BLOCKS)),
        system_blocks=store.map.system_blocks - store.map.pending_system_blocks,
        next_root_id=next_root_id,
        log=place and place.other_area(),
    )
    store.log.freeze(place)
    commit = Commit(
        store=store,
        generation=generation,
        nodes=nodes,
        data=store.data_writes,
        map=frozen,
        superblock=superblock,
        release_limit=limit,
        repairs=store.repairs.take(),
        discard=store.discard,
    )
    store.data_writes = []
    store.queued_blocks = 0
    store.generation += 1
    store.admission.begin_transaction(store.generation)
    return commit


def finish(commit: Commit) -> None:
    """Wait for the write, then release the blocks that no retained generation shows any more."""
    commit.done.wait()
    store = commit.store
    store.require_durable(commit.error)
    if commit.finished:
        return
    commit.finished = True
    store.superblock = commit.superblock
    store.log.rebase(commit.superblock)
    store.map.written(commit.map)
    store.settle(commit.nodes, commit.data)
    store.map.release(commit.release_limit)


def _gather(writes: list[tuple[int, Sequence[Buffer]]]) -> list[tuple[int, list[Buffer]]]:
    """Sort writes by block, and join writes to neighbouring blocks."""
    writes.sort(key=lambda write: write[0])
    joined: list[tuple[int, list[Buffer]]] = []
    end = -1
    for first, buffers in writes:
        if first != end:
            joined.append((first, []))
        joined[-1][1].extend(buffers)
        end = first + sum(map(len, buffers)) // BLOCK_SIZE_BYTES
    return joined
