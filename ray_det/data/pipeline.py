"""Micro-batches through Ray: loader tasks anywhere in the cluster, in plan order.

Each rank streams its own assignment inside the train loop, where the world size and the restored step are known:
nothing has to be split between ranks, and resuming is a shorter assignment. These are plain tasks: a Ray Data execution
per epoch takes 0.3 s to its first block, a millisecond per image of the train worker's own core and one read task per
block of all the epoch beforehand, and what it adds, the bound on what is in flight, is known here from the plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import ray

from ray_det.data.collate import LOADED, LoadSpec, Shard, load
from ray_det.data.headers import Header, HeaderChunk, map_in_threads
from ray_det.data.manifest import Manifest
from ray_det.data.plan import Assignment
from ray_det.types import MicroBatch

T = TypeVar("T")
R = TypeVar("R")

BLOCK_BATCHES = 8
"""Micro-batches that one task loads: fewer tasks, and one buffer for all of their pixels."""
BLOCK_BYTES = 64 << 20
"""Pixels of one block at most: what is in flight stays bounded on small object stores."""
BLOCKS_AHEAD = 2
"""Blocks asked for beyond one per loader: none waits for work while this process is busy with a step."""
RAY_FROM = 5000
"""Files from which on headers are read by Ray Data tasks: below, starting Ray takes longer than reading them."""


@ray.remote(num_cpus=1)
def load_block(manifest: Manifest, assignment: Assignment, spec: LoadSpec) -> list[MicroBatch]:
    return load(Shard(manifest, assignment, spec))


@ray.remote(num_cpus=1)
def wake() -> None:
    """The imports are the work."""


class Loaders:
    """The loader tasks of one train worker.

    Args:
        cpus: that they may use together; at least one.
    """

    def __init__(self, cpus: float) -> None:
        self._number = max(1, int(cpus))
        self._kept: dict[int, tuple[Manifest, ray.ObjectRef]] = {}

    def warm_up(self) -> None:
        """Have the loader processes start and import, while this one does something else."""
        for _ in range(self._number):
            wake.remote()

    def stream(self, work: Shard) -> Iterator[MicroBatch]:
        """Load a shard's micro-batches and yield them in order.

        The manifest goes to the object store once; what else a task needs is its own part of the assignment.

        Raises:
            RuntimeError: a micro-batch came out of turn.
            UserError: what `collate.load` raised in a task.
        """
        blocks, turn = _blocks(work.assignment), 0
        fetcher = ThreadPoolExecutor(1)  # brings blocks here, also from other nodes, before they are waited for
        asked: deque[Future[list[MicroBatch]]] = deque()

        def ask(number: int) -> None:
            for block in islice(blocks, number):
                asked.append(fetcher.submit(ray.get, load_block.remote(self._put(work.manifest), block, work.spec)))

        try:
            ask(self._number + BLOCKS_AHEAD)
            while asked:
                for batch in asked.popleft().result():
                    _check_turn(batch, work.assignment.keys[turn])
                    turn += 1
                    yield _own(batch)
                ask(1)
        finally:
            fetcher.shutdown(wait=False, cancel_futures=True)

    def _put(self, manifest: Manifest) -> ray.ObjectRef:
        known = self._kept.get(id(manifest))
        if known is None:
            table = manifest.table.select(LOADED).combine_chunks()
            known = self._kept[id(manifest)] = manifest, ray.put(replace(manifest, table=table))
        return known[1]


def _own(batch: MicroBatch) -> MicroBatch:
    """With small arrays of its own; pixels stay read-only views of the object store."""
    boxes, labels = [b.copy() for b in batch.boxes_N4], [n.copy() for n in batch.labels_N]
    return replace(batch, boxes_N4=boxes, labels_N=labels)


def _check_turn(batch: MicroBatch, key: np.ndarray) -> None:
    got = (batch.epoch, batch.step, batch.index)
    if got != tuple(key):
        raise RuntimeError(f"micro-batch (epoch, step, index) {got} came where the plan has {tuple(map(int, key))}")


def _blocks(assignment: Assignment) -> Iterator[Assignment]:
    """Its parts, each of a task: small at first, so that the first step does not wait."""
    areas = np.diff(assignment.offsets) * assignment.canvas.prod(axis=1, dtype=np.int64) * 3
    start, most = 0, 1
    while start < len(assignment):
        room = int(np.searchsorted(np.cumsum(areas[start : start + most]), BLOCK_BYTES, side="right"))
        stop = start + max(1, room)
        yield assignment.slice(start, stop)
        start, most = stop, min(2 * most, BLOCK_BATCHES)


def map_chunks(
    function: Callable[[HeaderChunk], list[Header]],
    chunks: list[HeaderChunk],
    *,
    connect: Callable[[], None],
) -> list[list[Header]]:
    """The preflight's parallel map: threads for a few files, Ray Data tasks for many, results in order.

    Args:
        connect: called before Ray is used; starts it where that is still to be done.
    """
    if sum(len(names) for _, names in chunks) < RAY_FROM:
        return map_in_threads(function, chunks)
    connect()
    return ray_map_chunks(function, chunks)


def ray_map_chunks(function: Callable[[T], R], chunks: list[T]) -> list[R]:
    """`list(map(function, chunks))` as Ray Data tasks, results in order."""
    import ray.data  # a second that loaders need not wait for

    reference = ray.put(chunks)
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = -1  # a storage may be out of reach for a while
    context.enable_progress_bars = False

    def run(block: Any) -> dict[str, np.ndarray]:
        inputs = ray.get(reference)
        results = np.empty(len(block["id"]), object)
        results[:] = [function(inputs[i]) for i in block["id"]]
        return {"id": block["id"], "result": results}

    dataset = ray.data.range(len(chunks), override_num_blocks=len(chunks)).map_batches(run, batch_size=None)
    rows = {int(row["id"]): row["result"] for row in dataset.iter_rows()}
    return [rows[i] for i in range(len(chunks))]
