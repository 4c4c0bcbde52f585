"""How images flow through one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ray_det.types import MicroBatch


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
