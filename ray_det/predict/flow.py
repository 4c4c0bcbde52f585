"""How images flow through one process: read ahead by threads, gathered by canvas."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

from ray_det.types import MicroBatch

T = TypeVar("T")
R = TypeVar("R")


def ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """`map(function, items)` with at most so many of its results waiting: a pool's own map takes all items at once."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def by_canvas(images: Iterable[MicroBatch], batch_size: int, most: int) -> Iterator[list[MicroBatch]]:
    """Groups of equal canvases, full ones where at most so many images wait for others of their canvas."""
    waiting: dict[tuple[int, ...], list[MicroBatch]] = {}
    for image in images:
        canvas = image.pixels_BHW3.shape[1:3]
        group = waiting.setdefault(canvas, [])
        group.append(image)
        if len(group) < batch_size:
            if sum(map(len, waiting.values())) < most:
                continue
            canvas = max(waiting, key=lambda key: len(waiting[key]))
        yield waiting.pop(canvas)
    yield from waiting.values()
