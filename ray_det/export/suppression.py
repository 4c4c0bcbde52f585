"""Non-maximum suppression with results of a fixed shape, for graphs whose shapes must be known: in torch and in ONNX.

Shape legend: B images, N boxes of one image, K boxes that are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms

_FLOAT, _BOOL = 1, 9  # ONNX's numbers of types
_MANY = 0x7FFFFFFFFFFFFFFF


@torch.library.custom_op("ray_det::nms_mask", mutates_args=())
def nms_mask(boxes_BN4: Tensor, scores_BN: Tensor, groups_BN: Tensor, groups: int, iou: float) -> Tensor:
    """bool (B, N): boxes that NMS keeps within their group (0..groups - 1). Places of score 0 have none."""
    kept = torch.zeros_like(scores_BN, dtype=torch.bool)
    for boxes, scores, group, row in zip(boxes_BN4, scores_BN, groups_BN, kept, strict=True):
        there = torch.where(scores > 0)[0]
        row[there[batched_nms(boxes[there], scores[there], group[there], iou)]] = True
    return kept


@nms_mask.register_fake
def _(boxes_BN4: Tensor, scores_BN: Tensor, groups_BN: Tensor, groups: int, iou: float) -> Tensor:
    return torch.empty_like(scores_BN, dtype=torch.bool)


def onnx_operators() -> dict[Any, Any]:
    """What `torch.onnx.export` takes for operators that it does not know."""
    from onnxscript import opset18

    op: Any = opset18  # its types know tensors alone, where it takes numbers and lists too

    def nms(boxes: Any, scores: Any, group: Any, groups: int, iou: float) -> Any:
        known = op.Reshape(op.Range(0, groups, 1), [1, -1, 1])
        mine = op.Equal(op.Unsqueeze(group, [1]), known)
        scores_BGN = op.Where(mine, op.Unsqueeze(scores, [1]), op.CastLike(0.0, scores))
        found = op.NonMaxSuppression(boxes, scores_BGN, _MANY, iou, 0.0)  # rows of image, group, box
        at = op.Gather(found, [0, 2], axis=1)
        nowhere = op.ConstantOfShape(op.Shape(scores))
        here = op.Expand(op.Constant(value_float=1.0), op.Slice(op.Shape(at), [0], [1]))
        return op.Cast(op.ScatterND(nowhere, at, here), to=_BOOL)

    def all_true(values: Any) -> Any:
        return op.Cast(op.ReduceMin(op.Cast(values, to=_FLOAT), keepdims=0), to=_BOOL)

    return {torch.ops.ray_det.nms_mask.default: nms, torch.ops.aten._is_all_true.default: all_true}


def best(scores_BN: Tensor, k: int, *others: Tensor) -> tuple[Tensor, ...]:
    """The k best scores of every image, best first, and what others (B, N, …) have there; zeros where there are fewer.

    Any N will do, also one that is not known yet: shapes of the result are.
    """
    batch = scores_BN.shape[0]
    scores_BK, at_BK = torch.cat([scores_BN, scores_BN.new_zeros(batch, k)], dim=1).topk(k)
    at_BK = torch.where(scores_BK > 0, at_BK, torch.zeros_like(at_BK))
    taken = []
    for other in others:
        if other.dim() == 2:
            taken.append(other.gather(1, at_BK))
        else:
            taken.append(other.gather(1, at_BK[:, :, None].expand(-1, -1, other.shape[2])))
    return scores_BK, *taken


def suppressed(
    boxes_BN4: Tensor, scores_BN: Tensor, groups_BN: Tensor, groups: int, iou: float, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(boxes (B, K, 4), scores (B, K), groups (B, K)) after NMS within groups, best first; a score of 0 is no box."""
    kept = torch.ops.ray_det.nms_mask(boxes_BN4, scores_BN, groups_BN, groups, iou)
    scores, boxes, group = best(torch.where(kept, scores_BN, torch.zeros_like(scores_BN)), k, boxes_BN4, groups_BN)
    return boxes, scores, group


def clipped(boxes_BN4: Tensor, sizes_B2: Tensor) -> Tensor:
    """Boxes inside the real pixels of their images, (h, w)."""
    height, width = sizes_B2[:, 0], sizes_B2[:, 1]
    limits = torch.stack([width, height, width, height], dim=1).to(boxes_BN4.dtype)
    return boxes_BN4.clamp(min=0).minimum(limits[:, None])
