"""Hungarian matching of all decoder layers at once: one cost tensor, one transfer to the host.

A library that matches layer by layer stops the accelerator at every one of them. The costs are those of
Hugging Face `transformers`: they add up a class cost, the L1 distance and the negative generalised IoU
(Carion et al., https://arxiv.org/abs/2005.12872, section 3.1; with focal class cost Zhu et al.,
https://arxiv.org/abs/2010.04159, appendix A.3).

Shape legend: L layers, B images, Q queries, C classes, N boxes of the image that has most, M matches of a layer.
Boxes are centre x, centre y, width, height in shares of the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert


@dataclass(frozen=True)
class MatchCosts:
    """Weights of the parts of a match's cost."""

    classes: float
    l1: float
    giou: float
    focal: tuple[float, float] | None  # alpha and gamma of independent classes; None: softmax


@torch.no_grad()
def match(
    logits_LBQC: Tensor, boxes_LBQ4: Tensor, targets: list[dict[str, Tensor]], costs: MatchCosts
) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest assignment of every layer and image. Waits for the device once, or not at all without boxes.

    Args:
        targets: of every image "class_labels" (n,) and "boxes" (n, 4).

    Returns:
        int64 (L, M): queries, counted over the batch (b * Q + q), and the boxes that they match, counted over the
        batch too. An image contributes min(Q, n) of the M.
    """
    counts = [len(t["class_labels"]) for t in targets]
    layers, _, queries = logits_LBQC.shape[:3]
    if not any(counts):
        empty = np.zeros((layers, 0), np.int64)
        return empty, empty
    cost_LBNQ = match_cost(logits_LBQC, boxes_LBQ4, targets, costs).cpu().numpy()
    first = np.cumsum([0, *counts])
    query_LM, box_LM = [], []
    for cost_BNQ in cost_LBNQ:
        pairs = [linear_sum_assignment(cost_NQ[:n]) for cost_NQ, n in zip(cost_BNQ, counts, strict=True)]
        query_LM.append(np.concatenate([i * queries + query for i, (_, query) in enumerate(pairs)]))
        box_LM.append(np.concatenate([first[i] + box for i, (box, _) in enumerate(pairs)]))
    return np.stack(query_LM), np.stack(box_LM)


def match_cost(logits_LBQC: Tensor, boxes_LBQ4: Tensor, targets: list[dict[str, Tensor]], costs: MatchCosts) -> Tensor:
    """(L, B, N, Q), a box a row as the solver likes it. What is not finite becomes the largest number."""
    label_BN = pad_sequence([t["class_labels"] for t in targets], batch_first=True)
    box_BN14 = pad_sequence([t["boxes"] for t in targets], batch_first=True)[:, :, None]
    box_LB1Q4 = boxes_LBQ4[:, :, None]
    l1 = sum((a - b).abs() for a, b in zip(box_LB1Q4.unbind(-1), box_BN14.unbind(-1), strict=True))
    _, giou = overlap(box_LB1Q4, box_BN14)
    total = costs.l1 * l1 + costs.classes * _class_cost(logits_LBQC, label_BN, costs.focal) - costs.giou * giou
    largest = torch.finfo(total.dtype).max
    return torch.nan_to_num(total, nan=largest, posinf=largest, neginf=largest)


def _class_cost(logits_LBQC: Tensor, label_BN: Tensor, focal: tuple[float, float] | None) -> Tensor:
    scores_LBQC = logits_LBQC.softmax(-1) if focal is None else logits_LBQC.sigmoid()
    index = label_BN[:, :, None].expand(*scores_LBQC.shape[:2], -1, scores_LBQC.shape[2])
    p = scores_LBQC.transpose(2, 3).gather(2, index)
    if focal is None:
        return -p
    alpha, gamma = focal
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return alpha * (1 - p) ** gamma * -(p + 1e-8).log() - negative


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes (..., 4), cxcywh, broadcast against each other."""
    return overlap_of_corners(box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy"))


def overlap_of_corners(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same (https://arxiv.org/abs/1902.09630) of boxes xyxy."""
    ax0, ay0, ax1, ay1 = a.unbind(-1)
    bx0, by0, bx1, by1 = b.unbind(-1)
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp(min=0)
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp(min=0)
    both = width * height
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - both
    hull_width = (torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)).clamp(min=0)
    hull_height = (torch.maximum(ay1, by1) - torch.minimum(ay0, by0)).clamp(min=0)
    hull = hull_width * hull_height
    iou = both / union
    return iou, iou - (hull - union) / hull
