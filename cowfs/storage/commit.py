"""The commit: how one frozen transaction becomes the newest durable generation.

`begin` freezes what the transaction changed, in the thread of the store; `Commit.write` puts it on the
device, from any thread, while the next transaction goes on; `finish` makes it the past, in the thread
of the store again. A failed write or flush ends all writing for good (C8): the last generation stays.

Keeps I2 and I3: writes go to blocks that no retained generation shows, each once between two flushes;
but for bad copies, which are repaired first (repairs.py).
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
    """One generation on its way to the device."""

    store: Store
    generation: int
    nodes: list[Node]  # children before parents; the catalog's root is the last
    data: list[tuple[int, list[Buffer]]]
    map: FrozenMap
    superblock: Superblock
    release_limit: int
    repairs: list[tuple[int, int, bytes]]
    discard: Discard | None  # under way at the freeze: it may hold for free what this commit writes
    done: threading.Event = field(default_factory=threading.Event)
    error: DeviceError | CorruptError | None = None
    finished: bool = False
    written_bytes: int = 0

    def write(self) -> None:
        """Make this generation durable. Never raises a device's error: it is kept in `error`."""
        try:
            self._write()
        except (DeviceError, CorruptError) as error:
            self.error = error
        except BaseException as error:  # a fault of our own: not durable either
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
        # All that this generation points at is durable; nothing points at it yet.
        write_slot(device, superblock)
        device.flush()
        # This is the commit point: a mount from here on shows this generation.
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
        nodes: all dirty nodes, placed, children before parents, the catalog's root last.
        clean: mark the image as unmounted in order.

    Raises:
        NoSpaceError: the reserve was too small for this transaction, which is lost.
    """
    generation = store.generation
    frozen = store.map.freeze(generation, store.place_map())
    limit = store.release_limit()
    superblock = replace(
        store.superblock,
        generation=generation,
        flags=FLAG_CLEAN if clean else 0,
        committed_ns=time.time_ns(),
        oldest_retained=store.oldest_retained(),
        # Where an image told wrong numbers they stay wrong, but what is written can be read.
        used_blocks=max(0, min(store.map.used_blocks, store.map.total_blocks)),
        catalog_nodes=max(1, min(catalog_nodes, store.map.total_blocks // NODE_BLOCKS)),
        system_blocks=store.map.system_blocks - store.map.pending_system_blocks,
        next_root_id=next_root_id,
    )
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
    store.admission.opened(store.generation)
    return commit


def finish(commit: Commit) -> None:
    """Wait for the write, then let go of what the generation replaced.

    Raises:
        DeviceError: the write failed; the store is read-only from now on (C8).
    """
    commit.done.wait()
    store = commit.store
    if commit.error is not None:
        if store.failed is None:
            store.fail(commit.error)
        assert store.failed is not None
        raise store.failed
    if commit.finished:
        return
    commit.finished = True
    store.superblock = commit.superblock
    store.map.written(commit.map)
    store.settle(commit.nodes, commit.data)
    store.map.release(commit.release_limit)


def _gather(writes: list[tuple[int, Sequence[Buffer]]]) -> list[tuple[int, list[Buffer]]]:
    """The same writes in block order, neighbours joined to one."""
    writes.sort(key=lambda write: write[0])
    joined: list[tuple[int, list[Buffer]]] = []
    end = -1
    for first, buffers in writes:
        if first != end:
            joined.append((first, []))
        joined[-1][1].extend(buffers)
        end = first + sum(map(len, buffers)) // BLOCK_SIZE_BYTES
    return joined
