"""Micro-batches through Ray Data: loader tasks near the train worker, or where the cluster has room, in plan order.

Each rank streams its own assignment inside the train loop, where the world size and the restored step are known:
nothing has to be split between ranks, and resuming is a shorter assignment.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, count, pairwise
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data._internal.datasource.range_datasource import RangeDatasource

from ray_det.data.collate import Shard, from_table, load, to_table
from ray_det.data.image import LoadSpec
from ray_det.data.manifest import Manifest
from ray_det.data.plan import Assignment
from ray_det.types import MicroBatch

BLOCK_BATCHES = 8
"""Micro-batches that one task loads: fewer tasks, and one buffer for all of their pixels."""
BLOCK_BYTES = 64 << 20
"""Pixels of one block at most: what is in flight stays bounded on small object stores."""
PREFETCHED_BLOCKS = 1
"""Fetched to the train worker ahead of use."""
EXECUTION_BLOCKS = 2048
"""Blocks of one execution. Ray Data makes a read task for each before the first runs: an epoch may have too many."""

NODE_LABEL = "ray.io/node-id"


@ray.remote(num_cpus=1)
def wake(after: Any) -> None:
    """Import what a loader needs. (The function itself is pickled without its module.)

    Args:
        after: what must be there before this starts.
    """
    importlib.import_module(load.__module__)
    importlib.import_module("ray.data")


@ray.remote(num_cpus=1, num_returns="streaming", max_retries=-1)  # as Ray Data's tasks
def load_each(manifest: Manifest, part: Assignment, spec: LoadSpec) -> Iterator[pa.Table]:
    """Micro-batches one by one, each there as soon as it is loaded."""
    for i in range(len(part)):
        yield to_table(load(Shard(manifest, part, spec), i, i + 1))


def warm_up(cpus: float) -> None:
    """Have processes that the first stream needs start and import, while this one does something else.

    Args:
        cpus: that its loader tasks may use together. Half of them are woken, the others as the stream asks for them,
            and not beside the statistics: where cores are few, this process needs them too.
    """
    ready = _start_statistics()
    # By default a sweep's trial would have its tasks where its workers are to be.
    woken = wake.options(scheduling_strategy="DEFAULT", **near())
    for _ in range(max(1, int(cpus / 2))):
        woken.remote(ready)


def near() -> dict[str, Any]:
    """Where this process's tasks run: on its node while that has CPUs free, else on others. The pixels of an image are
    many times its file's bytes, and between nodes they take the network.
    """
    node = ray.get_runtime_context().get_node_id()
    elsewhere = {"label_selector": {NODE_LABEL: f"!{node}"}}
    return {"label_selector": {NODE_LABEL: node}, "fallback_strategy": [elsewhere]}


def _start_statistics() -> ray.ObjectRef | None:
    """Ray Data's own actor, for which its first execution would wait; -> what is there once it is."""
    try:
        from ray.data._internal.stats import get_or_create_stats_actor
    except ImportError:  # not with this version
        return None
    return get_or_create_stats_actor().__ray_ready__.remote()


class _Expected(NamedTuple):
    """Micro-batches that are loaded before they are asked for."""

    work: Shard
    first: int  # how many they are
    tables: list[ray.ObjectRefGenerator]  # of each task, one after the other


def _first(expected: _Expected, others: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """What was expected, and one more micro-batch: the others begin to be loaded while these are used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, others, None)
        for table in chain.from_iterable(expected.tables):
            yield from from_table(ray.get(table))
        batch = following.result()
    if batch is not None:
        yield batch


class Loaders:
    """The loader tasks of one train worker.

    Args:
        cpus: that those of a stream may use together.
        shared: manifests that are in the object store already; others are put there when they are first used.
    """

    def __init__(self, cpus: float, shared: Sequence[tuple[Manifest, ray.ObjectRef]] = ()) -> None:
        self._cpus = cpus
        self._shared = list(shared)
        self._key = uuid4().hex[:8]
        self._running: set[int] = set()
        self._expected: list[_Expected] = []

    def expect(self, shards: Sequence[Shard]) -> None:
        """Begin to load the first micro-batches of the very shards that `stream` will be given next.

        What was expected and not yet streamed is forgotten.
        """
        task = load_each.options(scheduling_strategy="DEFAULT", **near())
        self._expected = []
        for work in shards:
            manifest, first = self._put(work.manifest), _room(_areas(work.assignment)[:BLOCK_BATCHES])
            cuts = np.linspace(0, first, min(first, max(1, int(self._cpus / 2))) + 1).astype(int).tolist()
            parts = (work.assignment.slice(start, stop) for start, stop in pairwise(cuts))
            self._expected.append(_Expected(work, first, [task.remote(manifest, part, work.spec) for part in parts]))

    def stream(self, work: Shard) -> Iterator[MicroBatch]:
        """Load a shard's micro-batches and yield them in order.

        Raises:
            RuntimeError: a micro-batch came out of turn.
            UserError: wrapped in Ray's own error, what `collate.load` raised in a task.
        """
        turn = 0
        for batch in self._batches(work):
            _check_turn(batch, work.assignment.keys[turn])
            turn += 1
            yield batch
        if turn != len(work.assignment):
            raise RuntimeError(f"the loader gave {turn} of {len(work.assignment)} planned micro-batches")

    def _batches(self, work: Shard) -> Iterator[MicroBatch]:
        expected = next((one for one in self._expected if one.work is work), None)
        if expected is None:
            yield from self._executions(work, 0)
            return
        self._expected = [one for one in self._expected if one is not expected]
        others = self._executions(work, expected.first)
        yield from _first(expected, others)
        yield from others

    def _executions(self, work: Shard, start: int) -> Iterator[MicroBatch]:
        """The micro-batches from `start` on."""
        blocks = _blocks(work.assignment.slice(start, len(work.assignment)))
        for first in range(0, len(blocks), EXECUTION_BLOCKS):
            with self._name() as name:
                yield from self._execute(work, blocks[first : first + EXECUTION_BLOCKS], name)

    @contextmanager
    def _name(self) -> Iterator[str]:
        """Of one execution, free again once it has ended: Ray's metrics keep a hundred time series of a name for ever,
        and a new name for each epoch costs a megabyte each.
        """
        number = next(n for n in count() if n not in self._running)
        self._running.add(number)
        try:
            yield f"loaders_{self._key}_{number}"
        finally:
            self._running.remove(number)

    def _execute(self, work: Shard, blocks: list[Assignment], name: str) -> Iterator[MicroBatch]:
        manifest, plan, spec = self._put(work.manifest), ray.put(blocks), work.spec

        def load_block(rows: Any) -> Iterator[pa.Table]:
            images, parts = ray.get(manifest), ray.get(plan)
            for i in rows["id"]:
                yield to_table(load(Shard(images, parts[i], spec)))

        configure(ray.data.DataContext.get_current())
        # `ray.data.range` cannot be told where to run, and would not be one task with what follows.
        numbers = RangeDatasource(len(blocks), block_format="arrow", column_name="id")
        dataset = ray.data.read_datasource(numbers, override_num_blocks=len(blocks), num_cpus=1, **near())
        dataset = dataset.map_batches(load_block, batch_size=None, num_cpus=1, **near())
        dataset.get_dataset_id = lambda: name
        options = dataset.context.execution_options
        options.preserve_order = True
        options.resource_limits = options.resource_limits.copy(cpu=max(1.0, self._cpus))
        whole_blocks: Any = None
        tables = dataset.iterator().iter_batches(
            batch_size=whole_blocks, batch_format="pyarrow", prefetch_batches=PREFETCHED_BLOCKS
        )
        for table in tables:
            yield from from_table(table)

    def _put(self, manifest: Manifest) -> ray.ObjectRef:
        """In the object store, once: what else a task needs is its part of the plan."""
        for known, reference in self._shared:
            if known is manifest:
                return reference
        self._shared.append((manifest, ray.put(manifest)))
        return self._shared[-1][1]


def configure(context: ray.data.DataContext) -> None:
    """Ray Data as it is used here: quiet, and with blocks as tasks make them."""
    context.target_max_block_size = None  # a block is what a task yields
    context.execution_no_progress_timeout_s = -1  # it also counts the time in which the consumer pauses, to validate
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised: the logs would say them again


def _check_turn(batch: MicroBatch, key: np.ndarray) -> None:
    got = (batch.epoch, batch.step, batch.index)
    if got != tuple(key):
        raise RuntimeError(f"micro-batch (epoch, step, index) {got} came where the plan has {tuple(map(int, key))}")


def _blocks(assignment: Assignment) -> list[Assignment]:
    """Its parts, each of a task: small at first, so that the first step does not wait."""
    areas = _areas(assignment)
    blocks, start, most = [], 0, 1
    while start < len(assignment):
        stop = start + _room(areas[start : start + most])
        blocks.append(assignment.slice(start, stop))
        start, most = stop, min(2 * most, BLOCK_BATCHES)
    return blocks


def _areas(assignment: Assignment) -> np.ndarray:
    """int64 bytes of the pixels of each micro-batch."""
    return np.diff(assignment.offsets) * assignment.canvas.prod(axis=1, dtype=np.int64) * 3


def _room(areas: np.ndarray) -> int:
    """How many of these, from the first on, a block may hold; one at least where there is any."""
    return min(len(areas), max(1, int(np.searchsorted(np.cumsum(areas), BLOCK_BYTES, side="right"))))
