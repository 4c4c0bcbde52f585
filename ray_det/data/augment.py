"""Random changes of a training image, all drawn from the generator that is passed in.

Geometry is one crop, one resize and one flip; colour is one affine map of RGB: each is applied in a single pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from ray_det import boxes as box_ops
from ray_det.config import AugmentConfig
from ray_det.types import IMAGENET_MEAN

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
MIN_SIDE = 0.1
"""Boxes thinner than this many canvas pixels are not taught: their losses are noise."""


@dataclass(frozen=True)
class View:
    """How an image comes onto its canvas: source pixels [x0, x1) x [y0, y1), resized to height x width, flipped."""

    x0: int
    y0: int
    x1: int
    y1: int
    height: int
    width: int
    flip: bool = False
    colour: np.ndarray | None = None  # float32 (3, 4) affine map of RGB in 0..255


def whole(source: tuple[int, int], fit: tuple[int, int]) -> View:
    """The view of evaluation: all of an image of (h, w) `source`, resized to (h, w) `fit`."""
    return View(0, 0, source[1], source[0], *fit)


def sample(
    rng: np.random.Generator,
    config: AugmentConfig,
    source: tuple[int, int],
    fit: tuple[float, float],
    canvas: tuple[int, int],
    scale_range: tuple[float, float] | None = None,
) -> View:
    """Draw a view of an image of (h, w) `source`, whose plain resize is `fit`, onto a canvas of (h, w) `canvas`.

    A scale s <= 1 shrinks the whole image. With s > 1 the image outgrows the canvas: as much of it as the canvas
    holds is cut out at a random place, so the crop keeps near the canvas's aspect ratio and never adds padding.

    Args:
        scale_range: in place of the configuration's.
    """
    u = rng.random(7)  # always as many: what one image draws does not depend on its branch
    low, high = scale_range or config.scale
    scale = low + u[0] * (high - low)
    (y0, y1, height), (x0, x1, width) = (
        _crop_axis(source[axis], fit[axis] * scale, canvas[axis], u[1 + axis]) for axis in (0, 1)
    )
    colour = _colour(config, *(2 * u[4:7] - 1))
    return View(x0, y0, x1, y1, height, width, bool(u[3] < config.flip), colour)


def _crop_axis(source: int, scaled: float, canvas: int, u: float) -> tuple[int, int, int]:
    """(start, end, size on the canvas) along one axis."""
    if scaled <= canvas:
        return 0, source, max(round(scaled), 1)
    length = max(round(source * canvas / scaled), 1)
    start = int(u * (source - length + 1))
    return start, start + length, canvas


def _colour(config: AugmentConfig, brightness: float, contrast: float, saturation: float) -> np.ndarray | None:
    """float32 (3, 4): saturation, then contrast about ImageNet's mean gray, then brightness; arguments in -1..1."""
    if not (config.brightness or config.contrast or config.saturation):
        return None
    b, c, s = 1 + config.brightness * brightness, 1 + config.contrast * contrast, 1 + config.saturation * saturation
    mix = s * np.eye(3) + (1 - s) * LUMA
    gray = 255 * float(np.dot(LUMA, IMAGENET_MEAN))
    return np.concatenate([b * c * mix, np.full((3, 1), b * (1 - c) * gray)], axis=1).astype(np.float32)


def shrink_of(view: View) -> int:
    """The largest of 1, 2, 4 and 8 by which an image can be shrunk and still have a pixel for each of the view's."""
    spare = min((view.y1 - view.y0) / view.height, (view.x1 - view.x0) / view.width)
    return max((k for k in (2, 4, 8) if k <= spare), default=1)


def aligned(view: View, source: tuple[int, int], shrink: int) -> View:
    """The view with its crop grown by less than `shrink` pixels a side: it starts and ends between shrunk pixels."""

    def up(end: int, size: int) -> int:
        return min(-(-end // shrink) * shrink, size)

    x0, y0 = view.x0 // shrink * shrink, view.y0 // shrink * shrink
    return replace(view, x0=x0, y0=y0, x1=up(view.x1, source[1]), y1=up(view.y1, source[0]))


def apply(view: View, image_HW3: np.ndarray, out_HW3: np.ndarray, shrink: int = 1) -> None:
    """Write the view of an image into `out_HW3`, a (view.height, view.width, 3) window of a canvas.

    Each pass after the first works in place: fresh memory costs more than most of them.

    Args:
        shrink: what the image has been shrunk by; the view is aligned to it.
    """
    rows, columns = (slice(a // shrink, -(-b // shrink)) for a, b in ((view.y0, view.y1), (view.x0, view.x1)))
    pixels = image_HW3[rows, columns]
    if pixels.shape[:2] != (view.height, view.width):
        shrinks = view.height < pixels.shape[0] and view.width < pixels.shape[1]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        pixels = cv2.resize(pixels, (view.width, view.height), dst=out_HW3, interpolation=how)
    if view.colour is not None:
        pixels = cv2.transform(pixels, view.colour, dst=out_HW3)
    if view.flip:
        cv2.flip(pixels, 1, dst=out_HW3)
    elif pixels is not out_HW3:
        out_HW3[:] = pixels


def apply_to_boxes(
    view: View, boxes_N4: np.ndarray, min_visible: float, min_side: float = MIN_SIDE
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) xyxy in source pixels -> (float32 (K, 4) xyxy in canvas pixels, bool (N,) which K of N remain).

    A box remains if at least `min_visible` of its area is inside the view, and each side has `min_side` pixels there.
    """
    scale = np.array([view.width / (view.x1 - view.x0), view.height / (view.y1 - view.y0)] * 2)
    moved = (boxes_N4 - np.array([view.x0, view.y0] * 2)) * scale
    clipped = box_ops.clip(moved, view.height, view.width)
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = (box_ops.area(clipped) >= min_visible * box_ops.area(moved)) & (sides >= min_side).all(axis=1)
    if view.flip:
        clipped[:, [0, 2]] = view.width - clipped[:, [2, 0]]
    return clipped[keep].astype(np.float32), keep
