"""Micro-batches through Ray Data: loader tasks anywhere in the cluster, in plan order, one execution per epoch.

Each rank streams its own assignment inside the train loop, where the world size and the restored step are known:
nothing has to be split between ranks, and resuming is a shorter assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data

from ray_det.data.collate import Shard, from_table, load, to_table
from ray_det.data.headers import Header, HeaderChunk, map_in_threads
from ray_det.types import MicroBatch

T = TypeVar("T")
R = TypeVar("R")

BLOCK_BATCHES = 8
"""Micro-batches that one task loads: fewer tasks, and one buffer for all of their pixels."""
BLOCK_BYTES = 64 << 20
"""Pixels of one block at most: what is in flight stays bounded on small object stores."""

RAY_FROM = 5000
"""Files from which on headers are read by Ray Data tasks: below, starting Ray takes longer than reading them."""


def stream(work: Shard, *, loader_cpus: float | None = None, prefetch: int = 4) -> Iterator[MicroBatch]:
    """Load a shard's micro-batches by Ray Data tasks and yield them in order.

    Args:
        loader_cpus: CPUs that this execution may take; None leaves it to Ray Data.
        prefetch: micro-batches fetched to this process ahead of use.

    Raises:
        RuntimeError: a micro-batch came out of turn.
        UserError: wrapped in Ray's own error, what `collate.load` raised in a task.
    """
    if not len(work.assignment):
        return
    cuts = _block_cuts(work)
    reference = ray.put(work)

    def load_block(block: Any) -> Iterator[pa.Table]:
        shard = ray.get(reference)
        for i in block["id"]:
            yield to_table(load(shard, int(cuts[i]), int(cuts[i + 1])))

    _configure(ray.data.DataContext.get_current())
    blocks = len(cuts) - 1
    dataset = ray.data.range(blocks, override_num_blocks=blocks).map_batches(load_block, batch_size=None, num_cpus=1)
    options = dataset.context.execution_options
    options.preserve_order = True
    if loader_cpus is not None:
        options.resource_limits = options.resource_limits.copy(cpu=loader_cpus)
    rows = dataset.iterator().iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=prefetch)
    count = 0
    for table in rows:
        for batch in from_table(table):
            _check_turn(batch, work.assignment.keys[count])
            count += 1
            yield batch
    if count != len(work.assignment):
        raise RuntimeError(f"the loader gave {count} of {len(work.assignment)} planned micro-batches")


def _configure(context: ray.data.DataContext) -> None:
    context.target_max_block_size = None  # a block is what a task yields
    context.execution_no_progress_timeout_s = -1  # it also counts the time in which the consumer pauses, to validate
    context.enable_progress_bars = False


def _check_turn(batch: MicroBatch, key: np.ndarray) -> None:
    got = (batch.epoch, batch.step, batch.index)
    if got != tuple(key):
        raise RuntimeError(f"micro-batch (epoch, step, index) {got} came where the plan has {tuple(map(int, key))}")


def _block_cuts(work: Shard) -> np.ndarray:
    """Where blocks start among the micro-batches: small at first, so that the first step does not wait."""
    part = work.assignment
    largest = int((np.diff(part.offsets) * part.canvas.prod(axis=1, dtype=np.int64) * 3).max())
    full = max(1, min(BLOCK_BATCHES, BLOCK_BYTES // largest))
    cuts, size = [0], 1
    while cuts[-1] < len(part):
        cuts.append(min(cuts[-1] + size, len(part)))
        size = min(2 * size, full)
    return np.array(cuts)


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
    reference = ray.put(chunks)
    _configure(ray.data.DataContext.get_current())

    def run(block: Any) -> dict[str, np.ndarray]:
        inputs = ray.get(reference)
        results = np.empty(len(block["id"]), object)
        results[:] = [function(inputs[i]) for i in block["id"]]
        return {"id": block["id"], "result": results}

    dataset = ray.data.range(len(chunks), override_num_blocks=len(chunks)).map_batches(run, batch_size=None)
    rows = {int(row["id"]): row["result"] for row in dataset.iter_rows()}
    return [rows[i] for i in range(len(chunks))]
