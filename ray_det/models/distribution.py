"""Losses of boxes whose four sides are distributions over bins (D-FINE, https://arxiv.org/abs/2410.13842, section 4).

Shape legend: L layers, B images, R queries of the batch, M matches of a layer, K bins of a box side.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers.loss.loss_d_fine import weighting_function

TEMPERATURE = 5.0


def fine_grained_loss(bins_LM4K: Tensor, anchor_LM4: Tensor, box_LM4: Tensor, iou_LM: Tensor, config: Any) -> Tensor:
    """FGL: cross entropy with the two bins next to the true distance, weighted by IoU; summed.

    Args:
        bins_LM4K: logits of the distances from the anchor to the box's left, top, right and bottom.
        anchor_LM4, box_LM4: centre x, centre y, width, height in shares of the canvas.
    """
    with torch.no_grad():
        left_LM4, share_LM4 = side_bins(anchor_LM4, box_LM4, config)
    log_p = bins_LM4K.log_softmax(-1)
    on_left, on_right = (log_p.gather(-1, i[..., None]).squeeze(-1) for i in (left_LM4, left_LM4 + 1))
    return -((on_left * (1 - share_LM4) + on_right * share_LM4) * iou_LM[..., None]).sum()


def side_bins(anchor_LM4: Tensor, box_LM4: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """The bin (L, M, 4) left of every side's true distance, and the share of the bin right of it."""
    scale = abs(config.reg_scale)
    centre, size = anchor_LM4.split(2, -1)
    corners = box_convert(box_LM4, "cxcywh", "xyxy")
    outward = torch.cat([centre - corners[..., :2], corners[..., 2:] - centre], -1)
    distance = outward / (size / scale + 1e-16).repeat(1, 1, 2) - 0.5 * scale
    values_K = bin_values(config.max_num_bins, config.reg_scale, config.up, str(distance.device))
    below = (values_K <= distance[..., None]).sum(-1) - 1
    last = config.max_num_bins - 1
    left = below.clamp(0, last)
    low, high = (distance - values_K[left]).abs(), (values_K[left + 1] - distance).abs()
    share = torch.where(below < 0, 0.0, torch.where(below > last, 1.0, low / (low + high)))
    return left, share


@lru_cache(maxsize=8)
def bin_values(bins: int, scale: float, up: float, device: str) -> Tensor:
    """The distances (K) that the bins stand for, in `1 / scale` of the anchor's size; sent to the device once."""
    with torch.inference_mode(False), torch.no_grad():
        return weighting_function(bins, torch.tensor([up]), scale).to(device)  # pyright: ignore[reportArgumentType]


def distillation_loss(
    bins_LR4K: Tensor, teacher_R4K: Tensor, score_R: Tensor, at: tuple[Tensor, Tensor], iou_LM: Tensor, images: int
) -> Tensor:
    """DDF: Kullback-Leibler divergence from the last layer's distributions, summed over layers.

    Queries with and without a box are averaged by themselves, then weighted by the square root of how many they are.

    Args:
        score_R: the last layer's best class, the weight of a query without a box; one with a box has its IoU.
        at: index of the matched queries in (L, R).
    """
    layers, queries = bins_LR4K.shape[:2]
    positives = at[1].shape[1]
    counts = (4 * positives, 4 * (queries - positives))
    roots = [(count / images) ** 0.5 for count in counts]
    positive, negative = (root / sum(roots) / max(count, 1) for root, count in zip(roots, counts, strict=True))
    weight_LR = (negative * score_R.detach()).repeat(layers, 1).index_put(at, positive * iou_LM)
    student = (bins_LR4K / TEMPERATURE).log_softmax(-1)
    teacher = (teacher_R4K.detach() / TEMPERATURE).log_softmax(-1)
    divergence_LR = (teacher.exp() * (teacher - student)).sum((-2, -1))
    return TEMPERATURE**2 * (weight_LR * divergence_LR).sum()
