"""The preflight's parallel map: threads, or Ray Data tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data

from ray_det.data.headers import Header, HeaderChunk, map_in_threads
from ray_det.data.pipeline import configure
from ray_det.types import TrainingError, UserError

T = TypeVar("T")
R = TypeVar("R")

RAY_FROM = 5000
"""Files from which on headers are read by Ray Data tasks: below, starting Ray takes longer than reading them."""


def map_chunks(
    function: Callable[[HeaderChunk], list[Header]],
    chunks: list[HeaderChunk],
    *,
    connect: Callable[[], object],
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
    """`list(map(function, chunks))` as Ray Data tasks, results in order; a UserError or TrainingError ends it."""
    reference = ray.put(chunks)
    configure(ray.data.DataContext.get_current())

    def attempt(chunk: T) -> R | UserError | TrainingError:
        try:
            return function(chunk)
        except (UserError, TrainingError) as error:
            return error  # Ray Data would wrap it in an error of its own

    def run(block: Any) -> dict[str, np.ndarray]:
        inputs = ray.get(reference)
        results = np.empty(len(block["id"]), object)
        results[:] = [attempt(inputs[i]) for i in block["id"]]
        return {"id": block["id"], "result": results}

    dataset = ray.data.range(len(chunks), override_num_blocks=len(chunks)).map_batches(run, batch_size=None)
    rows: dict[int, R] = {}
    for row in dataset.iter_rows():
        if isinstance(row["result"], UserError | TrainingError):
            raise row["result"]
        rows[int(row["id"])] = row["result"]
    return [rows[i] for i in range(len(chunks))]
