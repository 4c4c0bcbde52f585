"""The losses of torchvision's FCOS and RetinaNet, all images at once and without waiting for the device.

torchvision's own stop an accelerator wherever they pick anchors that have a box, or count them, RetinaNet's eight times
for every image. Here the losses are those of all anchors, where one without a box is compared with itself, and counts
stay on the device. Losses and gradients are the same up to rounding.

Shape legend: B images, A anchors of the canvas, N boxes of one image, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.ops import box_convert, box_iou

from ray_det.models.detector import Target
from ray_det.models.matching import overlap_of_corners

ALPHA = 0.25
"""Of the focal loss, as in the paper and in torchvision; its gamma is 2."""


@dataclass(frozen=True)
class Assigned:
    """What every anchor should answer."""

    label_BA: Tensor  # -1: background
    box_BA4: Tensor  # xyxy canvas pixels; any box for the background
    ignored_BA: Tensor  # bool: neither one nor the other

    @property
    def found(self) -> Tensor:
        """bool (B, A): anchors with a box."""
        return self.label_BA >= 0


def fcos_losses(
    net: FCOS, targets: Sequence[Target], maps: dict[str, Tensor], anchors_A4: Tensor, per_level: list[int]
) -> dict[str, Tensor]:
    """FCOS (arXiv:1904.01355, 2006.09214), divided by the anchors with a box.

    Args:
        net: for the radius of its centre sampling.
        maps: float32 (B, A, C | 4 | 1), the head's.
        anchors_A4: xyxy canvas pixels.
        per_level: anchors of every pyramid level, sum A.
    """
    assigned = assign(targets, anchors_A4, centre_matcher(anchors_A4, per_level, net.center_sampling_radius))
    found_BA, box_BA4 = assigned.found, assigned.box_BA4
    coder = cast(Any, net.head).box_coder
    predicted_BA4 = coder.decode(maps["bbox_regression"], anchors_A4)
    left, top, right, bottom = coder.encode(anchors_A4, box_BA4).unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    along = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    centred_BA = torch.where(found_BA, (across * along).sqrt(), 0)
    centre_loss = F.binary_cross_entropy_with_logits(
        maps["bbox_ctrness"].squeeze(2), centred_BA, found_BA.float(), reduction="sum"
    )
    count = found_BA.sum().clamp(min=1)
    return {
        "classification": focal_loss(maps["cls_logits"], assigned.label_BA).sum() / count,
        "bbox_regression": giou_loss(predicted_BA4, assigned).sum() / count,
        "bbox_ctrness": centre_loss / count,
    }


def retinanet_losses(
    net: RetinaNet, targets: Sequence[Target], maps: dict[str, Tensor], anchors_A4: Tensor, per_level: list[int]
) -> dict[str, Tensor]:
    """RetinaNet (arXiv:1708.02002), each image divided by its anchors with a box. Arguments as for `fcos_losses`."""
    matcher = cast(Any, net.proposal_matcher)
    thresholds = matcher.low_threshold, matcher.high_threshold
    assigned = assign(targets, anchors_A4, partial(match_by_iou, anchors_A4=anchors_A4, thresholds=thresholds))
    own_A4, offset_BA4 = box_convert(anchors_A4, "xyxy", "cxcywh"), maps["bbox_regression"]
    if cast(Any, net.head).regression_head._loss_type == "giou":
        clip = net.box_coder.bbox_xform_clip
        box_loss_BA = giou_loss(decoded(offset_BA4, own_A4, clip), assigned)
    else:
        wanted_BA4 = encoded(assigned.box_BA4, own_A4)
        offset_BA4 = torch.where(assigned.found[..., None], offset_BA4, wanted_BA4)
        box_loss_BA = F.l1_loss(offset_BA4, wanted_BA4, reduction="none").sum(-1)
    class_loss_BA = focal_loss(maps["cls_logits"], assigned.label_BA) * ~assigned.ignored_BA
    count_B = assigned.found.sum(1).clamp(min=1)
    return {
        "classification": (class_loss_BA.sum(1) / count_B).mean(),
        "bbox_regression": (box_loss_BA.sum(1) / count_B).mean(),
    }


Match = tuple[Tensor, Tensor, Tensor]
"""Of one image's anchors: int64 (A,) the box, bool (A,) whether it is one, bool (A,) whether to ignore the anchor."""


def assign(targets: Sequence[Target], anchors_A4: Tensor, match: Callable[[Tensor], Match]) -> Assigned:
    """Every image's boxes to anchors, by `match`, which is asked where there are any."""
    none = anchors_A4.new_zeros(len(anchors_A4), dtype=torch.int64)
    first, index, ignored = 0, [], []
    count = sum(len(t["boxes"]) for t in targets)
    for target in targets:
        if boxes := len(target["boxes"]):
            box_A, found_A, ignored_A = match(target["boxes"])
            index.append(torch.where(found_A, box_A + first, count))
            ignored.append(ignored_A)
            first += boxes
        else:
            index.append(none + count)
            ignored.append(none > 0)
    index_BA = torch.stack(index)
    labels = torch.cat([*(t["labels"] for t in targets), none[:1] - 1])
    boxes = torch.cat([*(t["boxes"] for t in targets), anchors_A4[:1]])  # the last: for anchors without a box
    return Assigned(labels[index_BA], boxes[index_BA], torch.stack(ignored))


def centre_matcher(anchors_A4: Tensor, per_level: list[int], radius: float) -> Callable[[Tensor], Match]:
    """FCOS: the smallest box of the level's size that an anchor's centre is inside of, and near the centre of."""
    centre_A12 = ((anchors_A4[:, :2] + anchors_A4[:, 2:]) / 2)[:, None]
    size_A1 = (anchors_A4[:, 2] - anchors_A4[:, 0])[:, None]
    lower_A1, upper_A1 = size_A1 * 4, size_A1 * 8
    lower_A1[: per_level[0]] = 0
    upper_A1[-per_level[-1] :] = torch.inf

    def match(boxes_N4: Tensor) -> Match:
        top_left, bottom_right = boxes_N4[:, :2], boxes_N4[:, 2:]
        near_AN = (centre_A12 - (top_left + bottom_right) / 2).abs().amax(2) < radius * size_A1
        sides_AN4 = torch.cat([centre_A12 - top_left, bottom_right - centre_A12], 2)
        inside_AN, farthest_AN = sides_AN4.amin(2) > 0, sides_AN4.amax(2)
        fits_AN = near_AN & inside_AN & (farthest_AN > lower_A1) & (farthest_AN < upper_A1)
        area_N = (bottom_right - top_left).prod(1)
        rank_A, box_A = (fits_AN * (1e8 - area_N)).max(1)
        found_A = rank_A >= 1e-5
        return box_A, found_A, torch.zeros_like(found_A)

    return match


def match_by_iou(boxes_N4: Tensor, anchors_A4: Tensor, thresholds: tuple[float, float]) -> Match:
    """RetinaNet: the box of the largest IoU, from the upper threshold on, or if no anchor is nearer to some box."""
    low, high = thresholds
    iou_NA = box_iou(boxes_N4, anchors_A4)
    iou_A, box_A = iou_NA.max(0)
    nearest_A = (iou_NA == iou_NA.amax(1, keepdim=True)).any(0)
    found_A = (iou_A >= high) | nearest_A
    return box_A, found_A, ~found_A & (iou_A >= low)


def giou_loss(predicted_BA4: Tensor, assigned: Assigned) -> Tensor:
    """(B, A): 1 - generalised IoU (arXiv:1902.09630); 0 for the background."""
    predicted_BA4 = torch.where(assigned.found[..., None], predicted_BA4, assigned.box_BA4)
    return 1 - overlap_of_corners(predicted_BA4, assigned.box_BA4)[1]


def encoded(box_BA4: Tensor, own_A4: Tensor) -> Tensor:
    """Boxes, xyxy, relative to anchors, cxcywh (arXiv:1311.2524, appendix C)."""
    box_BA4 = box_convert(box_BA4, "xyxy", "cxcywh")
    offset = (box_BA4[..., :2] - own_A4[:, :2]) / own_A4[:, 2:]
    return torch.cat([offset, (box_BA4[..., 2:] / own_A4[:, 2:]).log()], -1)


def decoded(offset_BA4: Tensor, own_A4: Tensor, clip: float) -> Tensor:
    """The way back, of sizes that are at most exp(clip) times an anchor's."""
    centre = offset_BA4[..., :2] * own_A4[:, 2:] + own_A4[:, :2]
    half = offset_BA4[..., 2:].clamp(max=clip).exp() * own_A4[:, 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def focal_loss(logits_BAC: Tensor, label_BA: Tensor) -> Tensor:
    """(B, A): focal loss (arXiv:1708.02002), summed over the classes.

    Args:
        label_BA: the class that an anchor should answer with; -1: none.
    """
    return _FocalLoss.apply(logits_BAC, label_BA)


class _FocalLoss(torch.autograd.Function):
    """With its gradient, in one go: autograd would keep eight tensors of the logits' size, and go over them twice.

    All classes are taken for wrong ones, for which it is a p^2 softplus(x); then the right ones are put in their place.
    """

    @staticmethod
    def forward(ctx: Any, logits_BAC: Tensor, label_BA: Tensor) -> Tensor:
        loss_BAC, grad_BAC = _if_wrong(logits_BAC, 1 - ALPHA)
        loss_BA = loss_BAC.sum(-1)
        found_BA1, index_BA1 = (label_BA >= 0)[..., None], label_BA.clamp(min=0)[..., None]
        right_loss, right_grad = _if_wrong(-logits_BAC.gather(-1, index_BA1), ALPHA)
        loss_BA += torch.where(found_BA1, right_loss - loss_BAC.gather(-1, index_BA1), 0).squeeze(-1)
        right_grad = torch.where(found_BA1, -right_grad, grad_BAC.gather(-1, index_BA1))
        ctx.save_for_backward(grad_BAC.scatter_(-1, index_BA1, right_grad))
        return loss_BA

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BA: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_BAC,) = ctx.saved_tensors
        return grad_BAC * grad_BA[..., None], None


def _if_wrong(logits: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The focal loss of classes that are not there, and its gradient."""
    p, cross_entropy = logits.sigmoid(), F.softplus(logits)
    factor = weight * p.square()
    loss = factor * cross_entropy
    grad = (1 - p).mul_(cross_entropy).mul_(2).add_(p).mul_(factor)
    return loss, grad
