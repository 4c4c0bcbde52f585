"""Detections of all ranks to rank 0, every image exactly once, and what rank 0 makes of them back to all."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from ray_det.evaluate.results import Results

T = TypeVar("T")


def gather_lists(local: list[T], group: dist.ProcessGroup | None = None) -> list[T] | None:
    """The lists of all ranks, joined, on rank 0; None elsewhere.

    Args:
        group: a group of a backend that moves host objects (gloo); None where there is one process.
    """
    if group is None:
        return local
    rank = dist.get_rank(group)
    parts: list[Any] | None = [None] * dist.get_world_size(group) if rank == 0 else None
    dist.gather_object(local, parts, group_dst=0, group=group)
    return None if parts is None else [item for part in parts for item in part]


def from_main(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    if group is not None:
        dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


def require_each_once(results: Results, image_ids: np.ndarray) -> None:
    """Raises RuntimeError unless the results are of every image id exactly once."""
    if np.array_equal(np.sort(results.image_ids_I), np.sort(image_ids)):
        return
    seen = Counter(results.image_ids_I.tolist())
    missing = [int(i) for i in image_ids if not seen[int(i)]]
    twice = [i for i, n in seen.items() if n > 1]
    raise RuntimeError(
        f"evaluation must see every image once: {len(missing)} missing (first {missing[:3]}), "
        f"{len(twice)} repeated (first {twice[:3]})"
    )
