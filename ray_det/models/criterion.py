"""Criteria of Hugging Face `transformers`, all decoder layers at once and without waiting for the device.

The library's own classes go layer by layer and stop the accelerator some ten times at each: at every matcher's
transfer, every check of a box's corners, every boolean index. Here the layers are stacked, matched in one transfer,
and every count is known on the host. Which layers there are, and what they are compared with, stays the library's
decision: `without_syncs` puts these classes in the place of the library's inside its own loss function.

Sums over layers are returned where the library names each layer: the same total, to float tolerance.

Shape legend: L layers, B images, Q queries, R = B Q queries of the batch, C classes, N boxes of the batch, M matches
of a layer, K bins of a box side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_det.models.distribution import distillation_loss, fine_grained_loss
from ray_det.models.matching import MatchCosts, match, overlap

Outputs = dict[str, Any]
"""Of one layer: "logits" (B, Q, C), "pred_boxes" (B, Q, 4) cxcywh in shares of the canvas, and more with D-FINE."""


@dataclass(frozen=True)
class Matched:
    """Layers of one kind, decoder and encoder or denoising, and the boxes that their queries answer for."""

    layers: list[Outputs]
    query_LM: Tensor  # b * Q + q
    label_LM: Tensor
    box_LM4: Tensor
    num_boxes: float  # what the losses are divided by

    @cached_property
    def logits(self) -> Tensor:
        """(L, R, C)."""
        return stacked(self.layers, "logits")

    @cached_property
    def at(self) -> tuple[Tensor, Tensor]:
        """Index of the matched queries in (L, R, ...)."""
        return torch.arange(len(self.layers), device=self.query_LM.device)[:, None], self.query_LM

    @cached_property
    def predicted(self) -> Tensor:
        """Boxes (L, M, 4) of the matched queries."""
        return stacked(self.layers, "pred_boxes")[self.at]

    @cached_property
    def overlaps(self) -> tuple[Tensor, Tensor]:
        """IoU and generalised IoU (L, M) of the matches."""
        return overlap(self.predicted, self.box_LM4)

    def at_classes(self, value: Tensor | float) -> Tensor:
        """(L, R, C): the value where a query should answer with its class, else 0."""
        zeros = torch.zeros_like(self.logits)
        value = value if isinstance(value, Tensor) else zeros.new_full((), value)
        return zeros.index_put((*self.at, self.label_LM), value)


class StackedCriterion(nn.Module):
    """What all criteria share. A subclass takes the arguments of the library's class that it stands in for."""

    costs: MatchCosts

    def forward(self, outputs: Outputs, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        groups = matched_layers(outputs, targets, self.costs)
        parts = [self.losses(matched) | box_losses(matched) for matched in groups]
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: torch.stack([part[name] for part in parts if name in part]).sum() for name in names}

    def losses(self, matched: Matched) -> dict[str, Tensor]:
        """All but the box losses."""
        raise NotImplementedError


class DetrCriterion(StackedCriterion):
    """Softmax over the classes and "no object": DETR, Table Transformer, YOLOS."""

    def __init__(self, matcher: Any, num_classes: int, eos_coef: float, losses: list[str]) -> None:
        super().__init__()
        self.costs = MatchCosts(matcher.class_cost, matcher.bbox_cost, matcher.giou_cost, focal=None)
        self.num_classes, self.background = num_classes, eos_coef

    def losses(self, matched: Matched) -> dict[str, Tensor]:
        layers, queries, _ = matched.logits.shape
        class_LR = matched.query_LM.new_full((layers, queries), self.num_classes)
        class_LR = class_LR.index_put(matched.at, matched.label_LM)
        nll_LR = F.cross_entropy(matched.logits.flatten(0, 1), class_LR.flatten(), reduction="none")
        nll_LR = nll_LR.view(layers, queries)
        weighted = self.background * nll_LR.sum() + (1 - self.background) * nll_LR[matched.at].sum()
        matches = matched.query_LM.shape[1]
        return {"loss_ce": weighted / (matches + self.background * (queries - matches))}


class DeformableDetrCriterion(StackedCriterion):
    """Independent classes with the focal loss: Deformable, Conditional and DAB DETR."""

    def __init__(self, matcher: Any, num_classes: int, focal_alpha: float, losses: list[str]) -> None:
        super().__init__()
        self.costs = MatchCosts(matcher.class_cost, matcher.bbox_cost, matcher.giou_cost, focal=(0.25, 2.0))
        self.alpha = focal_alpha

    def losses(self, matched: Matched) -> dict[str, Tensor]:
        """Focal loss, https://arxiv.org/abs/1708.02002, gamma 2."""
        logits, truth = matched.logits, matched.at_classes(1.0)
        p = logits.sigmoid()
        missed = p * (1 - truth) + (1 - p) * truth
        weight = self.alpha * truth + (1 - self.alpha) * (1 - truth) if self.alpha >= 0 else 1.0
        loss = weight * F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * missed**2
        return {"loss_ce": loss.sum() / matched.num_boxes}


class RTDetrCriterion(StackedCriterion):
    """RT-DETR and RT-DETRv2. Its losses come weighted."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        focal = (config.matcher_alpha, config.matcher_gamma) if config.use_focal_loss else None
        self.costs = MatchCosts(config.matcher_class_cost, config.matcher_bbox_cost, config.matcher_giou_cost, focal)
        self.config = config

    def forward(self, outputs: Outputs, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        losses = super().forward(outputs, targets)
        return {name: value * getattr(self.config, f"weight_{name}") for name, value in losses.items()}

    def losses(self, matched: Matched) -> dict[str, Tensor]:
        """Varifocal loss, https://arxiv.org/abs/2008.13367, equation 2."""
        logits = matched.logits
        iou_LM = matched.overlaps[0].detach()
        quality = matched.at_classes(iou_LM)
        others = self.config.focal_loss_alpha * logits.detach().sigmoid() ** self.config.focal_loss_gamma
        weight = others * (1 - matched.at_classes(1.0)) + quality
        loss = F.binary_cross_entropy_with_logits(logits, quality, weight, reduction="sum")
        return {"loss_vfl": loss / matched.num_boxes}


class DFineCriterion(RTDetrCriterion):
    """RT-DETR's losses, and those of the distributions that D-FINE describes a box with."""

    def losses(self, matched: Matched) -> dict[str, Tensor]:
        with_bins = [i for i, layer in enumerate(matched.layers) if "pred_corners" in layer]
        if not with_bins:
            return super().losses(matched)
        layers, chosen = [matched.layers[i] for i in with_bins], slice(with_bins[0], with_bins[-1] + 1)
        at = (matched.at[0][: len(layers)], matched.query_LM[chosen])
        iou_LM = matched.overlaps[0][chosen].detach()
        bins_LR4K = stacked(layers, "pred_corners").unflatten(-1, (4, -1))
        anchor_LM4 = stacked(layers, "ref_points")[at]
        fine = fine_grained_loss(bins_LR4K[at], anchor_LM4, matched.box_LM4[chosen], iou_LM, self.config)
        teacher_R4K = layers[0]["teacher_corners"].flatten(0, 1).unflatten(-1, (4, -1))
        score_R = layers[0]["teacher_logits"].flatten(0, 1).sigmoid().amax(-1)
        images = len(layers[0]["logits"])
        distilled = distillation_loss(bins_LR4K, teacher_R4K, score_R, at, iou_LM, images)
        return super().losses(matched) | {"loss_fgl": fine / matched.num_boxes, "loss_ddf": distilled}


STANDS_IN_FOR: dict[str, type[StackedCriterion]] = {
    "ImageLoss": DetrCriterion,
    "DeformableDetrImageLoss": DeformableDetrCriterion,
    "RTDetrLoss": RTDetrCriterion,
    "DFineLoss": DFineCriterion,
}
"""Class of the library -> ours."""


def without_syncs(loss_function: Callable[..., Any]) -> Callable[..., Any]:
    """The library's loss function with these criteria in place of those that it names; one that names none as it is.

    The function is copied, so that nobody else's is changed.
    """
    code = getattr(loss_function, "__code__", None)
    if code is None or STANDS_IN_FOR.keys().isdisjoint(code.co_names):
        return loss_function
    own = cast(FunctionType, loss_function)
    return FunctionType(code, own.__globals__ | STANDS_IN_FOR, own.__name__, own.__defaults__, own.__closure__)


def box_losses(matched: Matched) -> dict[str, Tensor]:
    """L1 distance and generalised IoU of the matches, for a box."""
    l1 = F.l1_loss(matched.predicted, matched.box_LM4, reduction="sum")
    giou = (1 - matched.overlaps[1]).sum()
    return {"loss_bbox": l1 / matched.num_boxes, "loss_giou": giou / matched.num_boxes}


def matched_layers(outputs: Outputs, targets: list[dict[str, Tensor]], costs: MatchCosts) -> list[Matched]:
    """Decoder and encoder layers, by the matcher; and the denoising ones, whose boxes are known."""
    layers = [outputs, *outputs.get("auxiliary_outputs", ())]
    logits, boxes = (torch.stack([layer[name].detach() for layer in layers]) for name in ("logits", "pred_boxes"))
    query_LM, of_LM = match(logits, boxes, targets, costs)
    denoising = list(outputs.get("dn_auxiliary_outputs", ()))
    meta: dict[str, Any] = outputs["denoising_meta_values"] if denoising else {"dn_num_group": 0}
    counts, repeats = [len(t["class_labels"]) for t in targets], meta["dn_num_group"]
    parts = [query_LM.ravel(), of_LM.ravel(), *noisy_boxes(counts, repeats)]
    packed = torch.from_numpy(np.concatenate(parts)).to(logits.device, non_blocking=True)
    query, of, noisy_image, noisy_of = packed.split([len(part) for part in parts])
    label_N, box_N4 = torch.cat([t["class_labels"] for t in targets]), torch.cat([t["boxes"] for t in targets])
    query, of, num_boxes = query.view(query_LM.shape), of.view(query_LM.shape), max(sum(counts), 1)
    groups = [Matched(layers, query, label_N[of], box_N4[of], num_boxes)]
    if denoising:
        query = noisy_image * denoising[0]["logits"].shape[1] + torch.cat(meta["dn_positive_idx"])
        query, of = query.expand(len(denoising), -1), noisy_of.expand(len(denoising), -1)
        groups.append(Matched(denoising, query, label_N[of], box_N4[of], num_boxes * repeats))
    return groups


def noisy_boxes(counts: list[int], repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """int64: image and box, counted over the batch, of every positive denoising query, image by image."""
    images = np.repeat(np.arange(len(counts)), np.multiply(counts, repeats))
    first = np.cumsum([0, *counts])
    return images, np.concatenate([first[i] + np.tile(np.arange(n), repeats) for i, n in enumerate(counts)])


def stacked(layers: list[Outputs], name: str) -> Tensor:
    """(L, R, ...) of (B, Q, ...) for every layer."""
    return torch.stack([layer[name] for layer in layers]).flatten(1, 2)
