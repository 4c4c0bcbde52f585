"""Faster R-CNN's prediction as a function of tensors; see `graphs`.

Shape legend: as `graphs`, and P proposals of one image.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from ray_det.export.graphs import Answer, Graph, decoded, level_anchors
from ray_det.export.suppression import best, clipped, suppressed
from ray_det.models.detector import Batch
from ray_det.models.torchvision_adapter import TwoStageDetector

CANDIDATES = 4096
"""The best boxes of all classes, which enter the second stage's NMS: torchvision takes all above its threshold."""
BOX_SIDE = 1e-2
"""Shortest side of a box, pixels, as it is written into torchvision's code."""


class TwoStageGraph(Graph[TwoStageDetector]):
    """Faster R-CNN."""

    def __init__(self, detector: TwoStageDetector) -> None:
        super().__init__(detector)
        side = 8 * detector.size_divisor
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        with torch.no_grad():  # the pool takes its scales from the first features that it sees
            detector.eval().predict(Batch(blank, torch.ones(1, side, side, dtype=torch.bool), [(side, side)], []))

    @property
    def places(self) -> int:
        return self.detector.roi_heads.detections_per_img

    def answer(self, batch: Batch, sizes_B2: Tensor) -> Answer:
        images = self.detector.normalise(batch)
        features: dict[str, Tensor] = self.detector.net.backbone(images)
        proposals_BP4, objectness_BP = self._propose(images, list(features.values()), sizes_B2)
        heads: Any = self.detector.roi_heads
        pooled = self._pool(features, proposals_BP4)
        logits, codes = heads.box_predictor(heads.box_head(pooled))
        shape = (*objectness_BP.shape, -1)
        scores_BPC = logits.softmax(-1)[:, 1:].reshape(shape)
        classes = scores_BPC.shape[2]
        boxes = heads.box_coder.decode_single(codes, proposals_BP4.flatten(0, 1)).reshape(logits.shape[0], -1, 4)[:, 1:]
        boxes_BN4 = clipped(boxes.reshape(objectness_BP.shape[0], -1, 4), sizes_B2)
        there = (scores_BPC > heads.score_thresh) & (objectness_BP > 0)[:, :, None]
        scores_BN = torch.where(there, scores_BPC, torch.zeros_like(scores_BPC)).flatten(1)
        scores_BN = without_thin(boxes_BN4, scores_BN, BOX_SIDE)
        labels_BN = torch.arange(scores_BN.shape[1], device=images.device)[None].expand_as(scores_BN) % classes
        scores, boxes, labels = best(scores_BN, min(CANDIDATES, objectness_BP.shape[1] * classes), boxes_BN4, labels_BN)
        return suppressed(boxes, scores, labels, classes, heads.nms_thresh, self.places)

    def _propose(self, images: Tensor, features: list[Tensor], sizes_B2: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, P, 4) and scores (B, P), 0 where there are fewer."""
        rpn: Any = self.detector.rpn
        objectness, deltas = rpn.head(features)
        found = []
        for level, anchors_A4 in enumerate(level_anchors(rpn.anchor_generator, images, features)):
            scores_BA = objectness[level].permute(0, 2, 3, 1).flatten(1).sigmoid()
            codes_BA4 = deltas[level].permute(0, 2, 3, 1).reshape(scores_BA.shape[0], -1, 4)
            anchors_BA4 = anchors_A4[None].expand_as(codes_BA4)
            scores, codes, anchors = best(scores_BA, rpn._pre_nms_top_n["testing"], codes_BA4, anchors_BA4)
            boxes = clipped(decoded(rpn.box_coder, codes, anchors), sizes_B2)
            scores = torch.where(scores >= rpn.score_thresh, scores, torch.zeros_like(scores))
            found.append((boxes, without_thin(boxes, scores, rpn.min_size), torch.full_like(scores, level).long()))
        boxes, scores, levels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        boxes, scores, _ = suppressed(
            boxes, scores, levels, len(features), rpn.nms_thresh, rpn._post_nms_top_n["testing"]
        )
        return boxes, scores

    def _pool(self, features: dict[str, Tensor], proposals_BP4: Tensor) -> Tensor:
        """(B P, channels, side, side): from every level, of which each proposal keeps its own."""
        pool = cast(MultiScaleRoIAlign, self.detector.roi_heads.box_roi_pool)
        rois_N4 = proposals_BP4.flatten(0, 1)
        images, many = proposals_BP4.shape[:2]
        of_N = torch.arange(images, device=rois_N4.device)[:, None].expand(images, many).reshape(-1, 1)
        rois_N5 = torch.cat([of_N.to(rois_N4.dtype), rois_N4], dim=1)
        levels = [features[name] for name in pool.featmap_names if name in features]
        scales = cast(list[float], pool.scales)
        of_level_N = cast(Any, pool.map_levels)([rois_N4]) if len(levels) > 1 else torch.zeros_like(of_N[:, 0])
        pooled = [
            roi_align(level, rois_N5, pool.output_size, scale, pool.sampling_ratio)
            * (of_level_N == number)[:, None, None, None]
            for number, (level, scale) in enumerate(zip(levels, scales, strict=True))
        ]
        return torch.stack(pooled).sum(0)


def without_thin(boxes_BN4: Tensor, scores_BN: Tensor, side: float) -> Tensor:
    """The scores, 0 where a box has a shorter side."""
    sides = boxes_BN4[..., 2:] - boxes_BN4[..., :2]
    return torch.where((sides >= side).all(-1), scores_BN, torch.zeros_like(scores_BN))
