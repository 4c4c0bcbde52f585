"""Box formats. A box is four floats in pixels; x grows to the right, y down, (0, 0) is the top-left image corner.

`xywh` is COCO's (left, top, width, height); `xyxy` is (left, top, right, bottom). Coordinates are continuous:
an image of width w spans x from 0 to w, there is no "- 1" anywhere.
"""

from __future__ import annotations

import numpy as np


def xywh_to_xyxy(boxes_N4: np.ndarray) -> np.ndarray:
    """(N, 4) xywh -> (N, 4) xyxy, same dtype."""
    return np.concatenate([boxes_N4[:, :2], boxes_N4[:, :2] + boxes_N4[:, 2:]], axis=1)


def xyxy_to_xywh(boxes_N4: np.ndarray) -> np.ndarray:
    """(N, 4) xyxy -> (N, 4) xywh, same dtype."""
    return np.concatenate([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], axis=1)


def clip(boxes_N4: np.ndarray, height: float, width: float) -> np.ndarray:
    """(N, 4) xyxy clipped to an image of height x width pixels."""
    limit = np.array([width, height, width, height], boxes_N4.dtype)
    return np.clip(boxes_N4, 0, limit)


def area(boxes_N4: np.ndarray) -> np.ndarray:
    """(N,) areas in square pixels of (N, 4) xyxy boxes."""
    return (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
