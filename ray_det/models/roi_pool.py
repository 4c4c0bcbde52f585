"""RoIAlign on a feature pyramid (arXiv:1703.06870), with all threads of a CPU.

torchvision's uses one thread there, and its backward pass is the larger part of a training step. What it computes is
a weighted sum of feature vectors for every cell of a box, which is torch's `embedding_bag` on all levels at once.

Shape legend: B images, R boxes of all images, C channels, S cells along a side, T samples along a side of a cell.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper


def pool_boxes(
    pool: MultiScaleRoIAlign, features: dict[str, Tensor], boxes: list[Tensor], canvas: tuple[int, int]
) -> Tensor:
    """What `pool` gives, float32 (R, C, S, S); on a CPU with other rounding (1e-6).

    Args:
        pool: with a fixed number of samples, as all of torchvision's detectors have it.
        features: float32 (B, C, h, w), by level.
        boxes: float32 (r, 4) xyxy canvas pixels, for every image.
        canvas: (h, w) of the padded batch. The pool guesses every level's scale from it, once for all: sizes of
            the real pixels would mislead it.
    """
    canvases = [canvas] * len(boxes)
    if boxes[0].device.type != "cpu":
        return pool(features, boxes, canvases)
    if pool.scales is None:
        pool(features, [b[:0] for b in boxes], canvases)
    levels = [features[name] for name in pool.featmap_names if name in features]
    channels, (side, _) = levels[0].shape[1], cast(tuple[int, int], pool.output_size)
    pixels_PC = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, channels) for level in levels])
    index, weight = _samples(pool, levels, boxes, side)
    cells = embedding_bag(index, pixels_PC, per_sample_weights=weight, mode="sum")
    return cells.view(-1, side, side, channels).permute(0, 3, 1, 2).contiguous()


def _samples(pool: MultiScaleRoIAlign, levels: list[Tensor], boxes: list[Tensor], side: int) -> tuple[Tensor, Tensor]:
    """Rows of the levels' pixels, one level after the other, and their weights: (R S S, 4 T T) each."""
    sizes = torch.tensor([level.shape[2:] for level in levels])
    area = sizes.prod(1)
    first = (area * len(boxes)).cumsum(0) - area * len(boxes)
    level_R = cast(LevelMapper, pool.map_levels)(boxes)
    image_R = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(b) for b in boxes]))
    left, top, right, bottom = (torch.cat(boxes) * torch.tensor(pool.scales)[level_R, None]).unbind(1)
    height_R, width_R = sizes[level_R].unbind(1)
    y, y_weight = _along(top, bottom, height_R, side, pool.sampling_ratio)
    x, x_weight = _along(left, right, width_R, side, pool.sampling_ratio)
    row = (first[level_R] + image_R * area[level_R])[:, None, None] + y * width_R[:, None, None]
    index = row[:, :, None, :, None] + x[:, None, :, None, :]
    weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :] / pool.sampling_ratio**2
    return index.flatten(3).flatten(0, 2), weight.flatten(3).flatten(0, 2)


def _along(start: Tensor, end: Tensor, size: Tensor, side: int, samples: int) -> tuple[Tensor, Tensor]:
    """Pixels and weights of linear interpolation along one axis, (R, S, 2 T) each.

    Args:
        start, end: (R,) of the boxes, in pixels of their level.
        size: (R,) of their level, pixels.
    """
    cell_R1 = ((end - start).clamp(min=1) / side)[:, None]
    number = torch.arange(side * samples)
    at = start[:, None] + number // samples * cell_R1 + (number % samples + 0.5) * cell_R1 / samples
    last = (size - 1)[:, None]
    inside = (at >= -1) & (at <= last + 1)
    at = torch.minimum(at.clamp(min=0), last)
    low = at.floor()
    part = at - low
    pixel = torch.stack([low, torch.minimum(low + 1, last)], -1).long()
    weight = torch.stack([1 - part, part], -1) * inside[:, :, None]
    return pixel.unflatten(1, (side, samples)).flatten(2), weight.unflatten(1, (side, samples)).flatten(2)
