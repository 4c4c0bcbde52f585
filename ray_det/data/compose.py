"""Several images on one canvas: which meet, and where each of them goes. `picture` moves the pixels."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np

from ray_det import boxes as box_ops
from ray_det.config import AugmentConfig
from ray_det.data import augment
from ray_det.data.image import Size

T = TypeVar("T")
MIN_SIDE = 2.0
"""Boxes of cropped and composed images that are thinner, canvas pixels, are not taught (as in Ultralytics)."""
CUT = 0.2
"""A mosaic is cut at a random point this share of the canvas's sides away from its edges at least (YOLOv4)."""
MAX_COVERED = 0.3
"""Share of a box that what is pasted may hide (Ultralytics)."""
BETA = 32.0
"""MixUp's weight is drawn from Beta(32, 32), near a half (Ultralytics): both images' boxes count in full, so both must
be seen. "Bag of Freebies" draws from Beta(1.5, 1.5), and weights the losses."""


class Partners(NamedTuple, Generic[T]):
    """Images that an image meets: none or three, none or one, none or one."""

    mosaic: tuple[T, ...] = ()
    copy_paste: tuple[T, ...] = ()
    mixup: tuple[T, ...] = ()


class Tile(NamedTuple):
    """A view, and where its top-left corner comes to lie."""

    view: augment.View
    top: int
    left: int


def choose(rng: np.random.Generator, config: AugmentConfig, rows_N: np.ndarray) -> Partners[int]:
    """Draw whether an image meets others, and which of the manifest's rows `rows_N`."""
    u, rows = rng.random(3), rows_N[rng.integers(len(rows_N), size=5)].tolist()  # always as many, as in `sample`
    return Partners(
        tuple(rows[:3]) if u[0] < config.mosaic else (),
        tuple(rows[3:4]) if u[1] < config.copy_paste else (),
        tuple(rows[4:]) if u[2] < config.mixup else (),
    )


def mosaic(
    rng: np.random.Generator, config: AugmentConfig, sources: list[Size], fits: list[Size], canvas: Size
) -> tuple[list[Tile], Size]:
    """Four images around a random point of the canvas (YOLOv4, https://arxiv.org/abs/2004.10934); -> (tiles, size).

    Each is scaled by itself; what its quarter does not hold is cropped at a random place, and where it does not fill
    its quarter it touches the point. So that real pixels begin at the top left, as without a mosaic, the point then
    moves there by what is empty.

    Args:
        sources: the images.
        fits: what they are resized to without a mosaic.
    """
    cut = [round(side * (CUT + (1 - 2 * CUT) * u)) for side, u in zip(canvas, rng.random(2), strict=True)]
    heights, widths = ((at, side - at) for at, side in zip(cut, canvas, strict=True))
    views = [
        augment.sample(rng, config, sources[k], fits[k], (heights[k // 2], widths[k % 2]), config.mosaic_scale)
        for k in range(4)
    ]
    y, x = max(views[0].height, views[1].height), max(views[0].width, views[2].width)
    tiles = [Tile(v, y if k // 2 else y - v.height, x if k % 2 else x - v.width) for k, v in enumerate(views)]
    size = y + max(views[2].height, views[3].height), x + max(views[1].width, views[3].width)
    return tiles, size


class Patch(NamedTuple):
    """A rectangle of an offered image that is pasted, and what is in it."""

    rows: slice
    columns: slice
    boxes_J4: np.ndarray
    which_J: np.ndarray  # indices of the offered boxes that they are of


def patches(
    rng: np.random.Generator, present_N4: np.ndarray, offered_K4: np.ndarray, min_visible: float
) -> list[Patch]:
    """What to paste of the boxes that an image offers, over an image with boxes of its own.

    "Simple Copy-Paste" (Ghiasi et al., https://arxiv.org/abs/2012.07177) pastes a random subset of the objects along
    their masks. Here there are none, and boxes are pasted whole: other objects come along in them, with their boxes.
    A box that would hide more than `MAX_COVERED` of one that is there already is left out.
    """
    found: list[Patch] = []
    if not len(offered_K4):
        return found
    there, hidden = present_N4.astype(np.float64), np.zeros(len(present_N4))
    for k in rng.permutation(len(offered_K4))[: rng.integers(1, len(offered_K4) + 1)]:
        (x0, y0), (x1, y1) = np.floor(offered_K4[k, :2]).astype(int), np.ceil(offered_K4[k, 2:]).astype(int)
        low, high = np.array([x0, y0, x0, y0]), np.array([x1, y1, x1, y1])
        more = box_ops.area(np.clip(there, low, high)) / box_ops.area(there)
        inside = np.clip(offered_K4, low, high).astype(np.float32)
        big = ((inside[:, 2:] - inside[:, :2]) >= MIN_SIDE).all(axis=1)
        which = np.flatnonzero(big & (box_ops.area(inside) >= min_visible * box_ops.area(offered_K4)))
        if k not in which or (hidden + more > MAX_COVERED).any():
            continue
        found.append(Patch(slice(y0, y1), slice(x0, x1), inside[which], which))
        there = np.concatenate([there, inside[which]])
        hidden = np.concatenate([hidden + more, np.zeros(len(which))])
    return found
