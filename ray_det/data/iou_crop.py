"""The crop of SSD (Liu et al., https://arxiv.org/abs/1512.02325), as in torchvision's `RandomIoUCrop`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ray_det import boxes as box_ops
from ray_det.config import AugmentConfig

OPTIONS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Of these one is drawn: some box must have that much IoU with the crop; 1.0: no crop."""
TRIALS = 40


class Window(NamedTuple):
    """A part of an image: pixels [x0, x1) x [y0, y1)."""

    x0: int
    y0: int
    x1: int
    y1: int


def iou_crop(
    rng: np.random.Generator, config: AugmentConfig, boxes_N4: np.ndarray, size: tuple[int, int], aspect: float
) -> Window:
    """Draw a crop of an image of (h, w) `size` with xyxy boxes; all of the image where nothing else is found.

    Args:
        aspect: width / height of the canvas, which the crop is to keep near: the plan has chosen it for the whole
            image. On a square canvas this is torchvision's rule.
    """
    height, width = size
    whole = Window(0, 0, width, height)
    if not len(boxes_N4):
        return whole
    low, high = config.iou_crop_scale
    for option in rng.permutation(OPTIONS):  # torchvision draws with replacement: it may go on for ever
        if option >= 1:
            return whole
        for u in rng.random((TRIALS, 4)):
            h, w = (max(int(side * (low + v * (high - low))), 1) for side, v in zip(size, u[:2], strict=True))
            if not config.iou_crop_aspect[0] <= w / h / aspect <= config.iou_crop_aspect[1]:
                continue
            y, x = int((height - h + 1) * u[2]), int((width - w + 1) * u[3])
            window = Window(x, y, x + w, y + h)
            inside = boxes_N4[centred(boxes_N4, window)]
            if len(inside) and _iou(inside, window).max() >= option:
                return window
    return whole


def centred(boxes_N4: np.ndarray, window: Window) -> np.ndarray:
    """bool (N,): which boxes have their centre in the window. Those alone stay."""
    x, y = (boxes_N4[:, :2] + boxes_N4[:, 2:]).T / 2
    return (x > window.x0) & (x < window.x1) & (y > window.y0) & (y < window.y1)


def _iou(boxes_N4: np.ndarray, window: Window) -> np.ndarray:
    """(N,) intersection over union of boxes that reach into the window."""
    low, high = np.array(window[:2] * 2), np.array(window[2:] * 2)
    shared = box_ops.area(np.clip(boxes_N4, low, high))
    whole = (window.x1 - window.x0) * (window.y1 - window.y0)
    return shared / (box_ops.area(boxes_N4) + whole - shared)
