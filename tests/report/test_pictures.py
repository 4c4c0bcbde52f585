"""Drawn pictures: size, colours where boxes are, and what is left out."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from ray_det.report.pictures import PREDICTED_COLOUR, TRUE_COLOUR, Picture, draw, to_jpeg


def picture(height: int, width: int, true: Sequence[float] = (), found: Sequence[float] = (), score=0.9) -> Picture:
    """One true and one predicted box at most, of label 0."""
    pixels = np.full((height, width, 3), 120, np.uint8)
    boxes = [np.array(box, float).reshape(-1, 4) for box in (true, found)]
    labels = [np.zeros(len(b), int) for b in boxes]
    return Picture(5, pixels, boxes[0], labels[0], boxes[1], np.full(len(boxes[1]), score), labels[1])


def count(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((pixels == colour).all(axis=2).sum())


@pytest.mark.parametrize("size, drawn", [((60, 40), (480, 320)), ((600, 500), (600, 500)), ((1000, 4096), (250, 1024))])
def test_small_pictures_grow_and_large_ones_shrink(size, drawn):
    assert draw(picture(*size), ["a"]).shape == (*drawn, 3)


def test_true_and_predicted_boxes_lie_where_they_belong():
    drawn = draw(picture(500, 500, true=[50, 60, 200, 300], found=[260, 60, 450, 300]), ["a"])
    assert count(drawn[100:280, 40:60], TRUE_COLOUR) > 200
    assert count(drawn[100:280, 255:265], PREDICTED_COLOUR) >= 2 * 180
    assert count(drawn[:, :230], PREDICTED_COLOUR) == count(drawn[:, 240:], TRUE_COLOUR) == 0
    solid = (drawn[100:280, 261] == PREDICTED_COLOUR).all(axis=1)
    dashed = (drawn[100:280, 50] == TRUE_COLOUR).all(axis=1)
    assert solid.all()
    assert 0.4 < dashed.mean() < 0.9


def test_boxes_scale_with_the_picture():
    drawn = draw(picture(100, 100, found=[50, 30, 90, 80]), ["a"])
    columns = np.flatnonzero((drawn[300] == PREDICTED_COLOUR).all(axis=1))
    assert abs(columns.min() - 240) <= 2
    assert abs(columns.max() - 432) <= 2


def test_predictions_below_the_score_are_left_out():
    low = picture(500, 500, found=[50, 60, 200, 300], score=0.2)
    assert count(draw(low, ["a"]), PREDICTED_COLOUR) == 0
    assert count(draw(low, ["a"], min_score=0.1), PREDICTED_COLOUR) > 0


@pytest.mark.parametrize("box", [[-20, -20, 700, 700], [499, 499, 500, 500], [10, 10, 10, 10], [600, 600, 700, 700]])
def test_boxes_at_and_beyond_the_edge(box):
    assert draw(picture(500, 500, true=box, found=box), ["a name that is long"]).shape == (500, 500, 3)


def test_a_jpeg_comes_back():
    pixels = np.full((40, 60, 3), (200, 100, 50), np.uint8)
    with Image.open(io.BytesIO(to_jpeg(pixels))) as image:
        assert (image.format, image.size) == ("JPEG", (60, 40))
        assert np.abs(np.asarray(image).astype(int) - pixels).max() < 8
