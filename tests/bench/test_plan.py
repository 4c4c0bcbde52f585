"""`jobs/bench.py plan`: what its training steps are measured on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ray_det.bench import photos, plan
from ray_det.config import DatasetConfig


def test_training_steps_have_the_canvases_of_their_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(plan, "_step", lambda detector, optimizer, batch, canvas: steps.append((batch, canvas)))
    figures = list(plan.run(plan.Config(parts=("train",), repeats=1)))
    assert len(figures) == 2

    rest = iter(steps)
    for batch in (4, 16):
        for window in (16, 1) * 2:  # a warm-up of both arms, a repetition of both
            pixels = mean_pixels(rest, batch)
            data = DatasetConfig(image_size=320, window=window)
            epoch = plan.plan_of(photos.coco_sizes(plan.IMAGES, seed=0), data, batch, 1, 0)
            assert pixels == pytest.approx(epoch.canvas_S2.prod(axis=1, dtype=np.int64).mean(), rel=0.01)
    assert next(rest, None) is None


def mean_pixels(steps: Iterator[tuple[int, list[int]]], batch: int) -> float:
    """Of a canvas of the next 128 images."""
    some = [next(steps) for _ in range(128 // batch)]
    assert {size for size, _ in some} == {batch}
    return float(np.mean([height * width for _, (height, width) in some]))


def test_the_canvases_keep_their_order_and_all_parts_of_their_sizes() -> None:
    canvases = np.array([[9, 1], [2, 1], [1, 1], [4, 1], [3, 1], [6, 1], [5, 1], [8, 1]])
    assert plan.spread(canvases, 4)[:, 0].tolist() == [9, 2, 4, 6]
    assert plan.spread(canvases, 8).tolist() == canvases.tolist()
