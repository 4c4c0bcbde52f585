"""The arithmetic of composed and cropped images: what every draw must satisfy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from ray_det.config import AugmentConfig
from ray_det.data import compose
from ray_det.data.iou_crop import OPTIONS, iou_crop

SIDES = st.integers(32, 400)
SEEDS = st.integers(0, 10**6)


def random_boxes(rng: np.random.Generator, count: int, height: float, width: float) -> np.ndarray:
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * [width, height]
    return corners.reshape(count, 4)


@given(SEEDS, SIDES, SIDES, st.lists(st.tuples(SIDES, SIDES), min_size=4, max_size=4), st.floats(0.2, 2))
@settings(max_examples=60, deadline=None)
def test_tiles_of_a_mosaic_touch_one_point_and_stay_on_the_canvas(seed, height, width, fits, scale):
    config = AugmentConfig(mosaic_scale=(scale, scale))
    tiles, size = compose.mosaic(np.random.default_rng(seed), config, [(99, 77)] * 4, fits, (height, width))
    covered = np.zeros((height, width), int)
    for view, top, left in tiles:
        assert min(top, left) >= 0 and min(view.height, view.width) >= 1
        covered[top : top + view.height, left : left + view.width] += 1
    assert covered.max() == 1, "tiles overlap"
    ys, xs = np.nonzero(covered)
    assert (ys.max() + 1, xs.max() + 1) == size and (ys.min(), xs.min()) == (0, 0)
    (a, y0, x0), (b, y1, x1), (c, y2, x2), (d, y3, x3) = tiles
    assert y0 + a.height == y1 + b.height == y2 == y3 and x0 + a.width == x2 + c.width == x1 == x3
    for (view, _, _), fit in zip(tiles, fits, strict=True):
        assert view.height <= max(1, round(fit[0] * scale)) and view.width <= max(1, round(fit[1] * scale))


def test_partners_are_drawn_as_often_as_asked_among_the_rows():
    config, rows = AugmentConfig(mosaic=0.3, mixup=0.2, copy_paste=0.7), np.array([2, 5, 6, 11])
    drawn = [compose.choose(np.random.default_rng([s]), config, rows) for s in range(2000)]
    both = [bool(one.mosaic and one.copy_paste) for one in drawn]
    assert np.mean(both) == pytest.approx(0.3 * 0.7, abs=0.04), "they are drawn independently"
    for name, share, number in (("mosaic", 0.3, 3), ("mixup", 0.2, 1), ("copy_paste", 0.7, 1)):
        groups = [getattr(one, name) for one in drawn]
        assert {len(group) for group in groups} == {0, number}
        assert np.mean([len(group) > 0 for group in groups]) == pytest.approx(share, abs=0.04)
        found = np.bincount([row for group in groups for row in group])[rows]
        assert found.sum() == sum(map(len, groups)) and found.min() > 0.2 * found.sum()


@given(SEEDS, st.integers(0, 6), st.integers(1, 8), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_patches_hide_little_and_bring_all_that_they_show(seed, present, offered, min_visible):
    """Painted: pixels of a box that are still its own, and of an offered one that are pasted, are counted."""
    rng, size = np.random.default_rng(seed), 96
    there, new = (np.round(random_boxes(rng, n, size, size)) for n in (present, offered))
    there, new = (b[((b[:, 2:] - b[:, :2]) >= 1).all(1)].astype(np.float32) for b in (there, new))
    patches = compose.patches(rng, there, new, min_visible)
    hidden, brought = np.zeros((size, size), bool), []
    for patch in patches:
        hidden[patch.rows, patch.columns] = True
        shown = np.zeros((size, size), bool)
        shown[patch.rows, patch.columns] = True
        for k, box in enumerate(new.astype(int)):
            inside = shown[box[1] : box[3], box[0] : box[2]]
            ys, xs = np.nonzero(inside)
            thin = not len(xs) or min(np.ptp(xs), np.ptp(ys)) + 1 < compose.MIN_SIDE
            if thin or inside.mean() < min_visible - 1e-6:
                assert k not in patch.which_J
            elif inside.mean() > min_visible + 1e-6:
                expected = [xs.min() + box[0], ys.min() + box[1], xs.max() + 1 + box[0], ys.max() + 1 + box[1]]
                assert patch.boxes_J4[patch.which_J.tolist().index(k)].tolist() == expected
        assert patch.boxes_J4.dtype == np.float32 and len(patch.boxes_J4) == len(patch.which_J)
        brought += patch.which_J.tolist()
    for x0, y0, x1, y1 in there.astype(int):
        assert hidden[y0:y1, x0:x1].mean() <= compose.MAX_COVERED + 1e-6
    if not len(there) and len(new) and (new[:, 2:] - new[:, :2]).min() >= compose.MIN_SIDE:
        assert patches, "nothing was in the way of the first"


@given(SEEDS, SIDES, SIDES, st.floats(0.5, 2), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_an_iou_crop_keeps_its_limits_and_some_box_has_enough_overlap(seed, height, width, canvas, boxes):
    rng = np.random.default_rng(seed)
    config = AugmentConfig(iou_crop_scale=(0.3, 0.9), iou_crop_aspect=(0.5, 2))
    there = random_boxes(rng, boxes, height, width)

    class Draws(np.random.Generator):
        """Says which option comes first."""

        def permutation(self, x, axis=0):  # pyright: ignore[reportIncompatibleMethodOverride]
            self.options = super().permutation(x, axis)
            return self.options

    draws = Draws(np.random.PCG64(seed))
    window = iou_crop(draws, config, there, (height, width), canvas)
    x0, y0, x1, y1 = window
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    if window == (0, 0, width, height):
        return
    h, w = y1 - y0, x1 - x0
    assert 0.3 * height - 1 <= h <= 0.9 * height and 0.3 * width - 1 <= w <= 0.9 * width
    assert 0.5 <= w / h / canvas <= 2
    before = draws.options[: draws.options.tolist().index(1.0)]
    centres = (there[:, :2] + there[:, 2:]) / 2
    inside = ((centres > [x0, y0]) & (centres < [x1, y1])).all(axis=1)
    overlaps = box_iou(torch.from_numpy(there), torch.tensor([window], dtype=torch.float64)).numpy()[inside, 0]
    assert len(before) and overlaps.max() >= before.min()


def test_every_overlap_is_asked_for_and_no_crop_is_an_answer():
    """A box that fills half of the image can have any overlap but 0.9 and more, which the scale forbids."""
    config, box = AugmentConfig(iou_crop_aspect=(0.5, 2)), np.array([[20.0, 20, 80, 100]])
    windows = [iou_crop(np.random.default_rng(s), config, box, (120, 100), 1.0) for s in range(400)]
    whole = np.mean([w == (0, 0, 100, 120) for w in windows])
    assert 1 / len(OPTIONS) < whole < 0.5
    overlaps = box_iou(torch.from_numpy(box), torch.tensor(windows, dtype=torch.float64)).numpy()[0]
    assert overlaps.min() < 0.3 and overlaps.max() > 0.7
    assert iou_crop(np.random.default_rng(0), config, np.empty((0, 4)), (120, 100), 1.0) == (0, 0, 100, 120)
