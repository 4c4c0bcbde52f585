"""Geometry and colour: boxes go where their pixels go, everything stays on the canvas, all of it is seeded."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_det.config import AugmentConfig
from ray_det.data import augment

GEOMETRY = AugmentConfig(brightness=0, contrast=0, saturation=0)


@given(
    st.integers(0, 10**6),
    st.integers(40, 200),
    st.integers(40, 200),
    st.floats(0.5, 2.0),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_boxes_follow_the_pixels(seed, height, width, scale, flip):
    """A drawn rectangle is found again, by its pixels, where its box went."""
    rng = np.random.default_rng(seed)
    config = GEOMETRY.model_copy(update={"scale": (scale, scale), "flip": float(flip), "min_visible": 0.01})
    x0, y0 = rng.integers(0, width - 20), rng.integers(0, height - 20)
    box = np.array([[x0, y0, x0 + rng.integers(12, width - x0), y0 + rng.integers(12, height - y0)]], np.float64)
    image = np.zeros((height, width, 3), np.uint8)
    image[int(box[0, 1]) : int(box[0, 3]), int(box[0, 0]) : int(box[0, 2])] = 255
    fit = (2 * height, 2 * width)
    canvas = (-(-fit[0] // 32) * 32, -(-fit[1] // 32) * 32)
    view = augment.sample(rng, config, (height, width), fit, canvas)
    assert view.height <= canvas[0] and view.width <= canvas[1]
    out = np.empty((view.height, view.width, 3), np.uint8)
    augment.apply(view, image, out)
    boxes, keep = augment.apply_to_boxes(view, box, config.min_visible)
    ys, xs = np.nonzero(out[..., 0] > 127)
    if not len(boxes):
        assert not keep[0] and len(xs) < 0.02 * (box[0, 2] - box[0, 0]) * (box[0, 3] - box[0, 1]) * 4 * scale**2 + 64
        return
    found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    assert np.abs(found - boxes[0]).max() <= 1.5


def test_a_flip_at_the_original_size_is_exact_to_the_pixel():
    image = np.zeros((40, 60, 3), np.uint8)
    image[5:20, 7:30] = 255
    view = replace(augment.whole((40, 60), (40, 60)), flip=True)
    out = np.empty_like(image)
    augment.apply(view, image, out)
    boxes, _ = augment.apply_to_boxes(view, np.array([[7.0, 5.0, 30.0, 20.0]]), 0.25)
    ys, xs = np.nonzero(out[..., 0])
    assert boxes.tolist() == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]] == [[30, 5, 53, 20]]


def test_scale_above_one_never_pads():
    config = GEOMETRY.model_copy(update={"scale": (1.4, 1.4)})
    view = augment.sample(np.random.default_rng(0), config, (480, 640), (480, 640), (480, 640))
    assert (view.height, view.width) == (480, 640)
    assert (view.x1 - view.x0, view.y1 - view.y0) == (round(640 / 1.4), round(480 / 1.4))


def test_a_box_mostly_cut_off_is_not_taught():
    view = augment.View(50, 0, 100, 100, 100, 50)
    boxes = np.array([[0.0, 0, 60, 10], [0, 0, 80, 10], [10, 0, 40, 10]])
    moved, keep = augment.apply_to_boxes(view, boxes, min_visible=0.25)
    assert keep.tolist() == [False, True, False]
    assert moved.tolist() == [[0, 0, 30, 10]]


def recolour(image: np.ndarray, config: AugmentConfig, *draws: float) -> np.ndarray:
    matrix = augment._colour(config, *draws)
    assert matrix is not None
    return cv2.transform(image, matrix)


def test_colour_matrix_is_brightness_contrast_saturation():
    image = np.full((2, 2, 3), (200, 100, 50), np.uint8)
    config = AugmentConfig(brightness=0.5, contrast=0, saturation=0)
    bright = recolour(image, config, 1, 0, 0)
    assert bright[0, 0].tolist() == [255, 150, 75]
    gray = recolour(image, AugmentConfig(brightness=0, contrast=0, saturation=1), 0, 0, -1)
    assert np.ptp(gray[0, 0].astype(int)) <= 1 and abs(int(gray[0, 0, 0]) - 124) <= 1


def test_draws_depend_on_the_generator_alone():
    views = [
        augment.sample(np.random.default_rng([1, 2, s]), AugmentConfig(), (90, 90), (64, 64), (64, 96))
        for s in (3, 3, 4)
    ]
    assert str(views[0]) == str(views[1]) != str(views[2])


def test_scale_range_must_be_ordered():
    with pytest.raises(ValueError, match=r"1\.2 > 0\.8"):
        AugmentConfig(scale=(1.2, 0.8))


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.37])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("coloured", [False, True])
def test_passes_in_place_are_passes_one_by_one(scale, flip, coloured):
    """The same to the bit as resize, colour and flip into memory of their own, on a window of a canvas."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (61, 83, 3), np.uint8)
    colour = np.array([[1.1, 0.1, 0, 5], [0, 0.9, 0.1, -3], [0.05, 0, 1.2, 0]], np.float32) if coloured else None
    view = augment.View(5, 3, 79, 60, round(57 * scale), round(74 * scale), flip, colour)
    before = image.copy()
    canvas = np.full((view.height + 7, view.width + 9, 3), 77, np.uint8)
    augment.apply(view, image, canvas[: view.height, : view.width])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    expected = cv2.resize(image[3:60, 5:79], (view.width, view.height), interpolation=how)
    expected = expected if colour is None else cv2.transform(expected, colour)
    assert np.array_equal(canvas[: view.height, : view.width], expected[:, ::-1] if flip else expected)
    assert (canvas[view.height :] == 77).all() and (canvas[:, view.width :] == 77).all()
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("crop", "size", "expected"),
    [((960, 1280), (240, 320), 4), ((960, 1280), (241, 320), 2), ((960, 1280), (961, 1280), 1), ((99, 16), (9, 1), 8)],
)
def test_an_image_is_shrunk_while_every_pixel_of_the_view_has_one(crop, size, expected):
    assert augment.shrink_of(augment.View(8, 16, 8 + crop[1], 16 + crop[0], *size)) == expected


def test_an_aligned_view_shows_all_that_it_did_and_no_more_than_there_is():
    view = augment.aligned(augment.View(5, 9, 90, 60, 10, 10), (61, 90), 4)
    assert (view.x0, view.y0, view.x1, view.y1) == (4, 8, 90, 60)
    assert augment.aligned(view, (61, 90), 1) == view
