"""A detector's whole prediction as a function of tensors: pixels and sizes in, boxes, scores and labels out.

It answers as the detector's `predict`, in shapes that are known beforehand: where fewer boxes are found than places,
the others have score 0 and label -1.

Shape legend: B images, H W canvas pixels, N boxes of one image, K boxes of the answer, A anchors, C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_convert

from ray_det.export.suppression import best, clipped, suppressed
from ray_det.models.detector import Batch, Detector, pixel_mask
from ray_det.models.torchvision_adapter import DenseDetector
from ray_det.models.transformers_adapter import DETECTIONS_PER_IMAGE, TransformersDetector

D = TypeVar("D", bound=Detector)
Answer = tuple[Tensor, Tensor, Tensor]
"""boxes float32 (B, K, 4) xyxy in canvas pixels, scores float32 (B, K), labels int64 (B, K)"""


class Graph(nn.Module, Generic[D]):
    """The base of all: normalises, hides the padding, and names what is no box.

    Args:
        detector: whose modules are used as they are.
    """

    detector: D

    def __init__(self, detector: D) -> None:
        super().__init__()
        self.detector = detector

    @property
    @abstractmethod
    def places(self) -> int:
        """K"""

    def forward(self, images: Tensor, sizes: Tensor) -> Answer:
        """
        Args:
            images: uint8 (B, 3, H, W) RGB; what is beyond the sizes does not matter.
            sizes: int64 (B, 2), (h, w) of the real pixels at the top left.
        """
        height, width = images.shape[-2:]
        boxes, scores, labels = self.answer(Batch(images, pixel_mask(sizes, height, width), [], []), sizes)
        there = scores > 0
        boxes = torch.where(there[:, :, None], boxes, torch.zeros_like(boxes))
        return boxes, scores, torch.where(there, labels, torch.full_like(labels, -1))

    @abstractmethod
    def answer(self, batch: Batch, sizes_B2: Tensor) -> Answer:
        """Boxes inside the real pixels, with a score of 0 where there is none."""


class TransformersGraph(Graph[TransformersDetector]):
    """Detection transformers: the best of a fixed number of queries."""

    @property
    def places(self) -> int:
        config = cast(Any, self.detector.net.config)
        softmax = config.model_type == "detr"
        return min(DETECTIONS_PER_IMAGE, config.num_queries * (1 if softmax else config.num_labels))

    def answer(self, batch: Batch, sizes_B2: Tensor) -> Answer:
        outputs = self.detector.outputs(batch, None)
        height, width = batch.images_B3HW.shape[-2:]
        classes = cast(int, self.detector.net.config.num_labels)
        logits_BQC, boxes_BQ4 = outputs.logits.float(), outputs.pred_boxes.float()
        if logits_BQC.shape[-1] > classes:
            scores_BQ, labels_BQ = logits_BQC.softmax(-1)[..., :classes].max(-1)
            scores, query = scores_BQ.topk(self.places)
            labels = labels_BQ.gather(1, query)
        else:
            scores, index = logits_BQC.sigmoid().flatten(1).topk(self.places)
            query, labels = index // classes, index % classes
        boxes = box_convert(boxes_BQ4.gather(1, query[:, :, None].expand(-1, -1, 4)), "cxcywh", "xyxy")
        x0, y0, x1, y1 = boxes.unbind(-1)
        return clipped(torch.stack([x0 * width, y0 * height, x1 * width, y1 * height], -1), sizes_B2), scores, labels


class DenseGraph(Graph[DenseDetector]):
    """FCOS and RetinaNet."""

    @property
    def places(self) -> int:
        return self.detector.net.detections_per_img

    def answer(self, batch: Batch, sizes_B2: Tensor) -> Answer:
        net: Any = self.detector.net
        images = self.detector.normalise(batch)
        features = list(net.backbone(images).values())
        found = [
            self._level(anchors_A4, net.head([feature]), sizes_B2)
            for feature, anchors_A4 in zip(features, level_anchors(net.anchor_generator, images, features), strict=True)
        ]
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        classes = net.head.classification_head.num_classes
        return suppressed(boxes, scores, labels, classes, net.nms_thresh, self.places)

    def _level(self, anchors_A4: Tensor, maps: dict[str, Tensor], sizes_B2: Tensor) -> Answer:
        """The best of one level, by `topk_candidates`."""
        net: Any = self.detector.net
        scores_BAC = maps["cls_logits"].float().sigmoid()
        if isinstance(net, FCOS):
            scores_BAC = torch.sqrt(scores_BAC * maps["bbox_ctrness"].float().sigmoid())
        classes = scores_BAC.shape[2]
        scores_BN = scores_BAC.flatten(1)
        scores_BN = torch.where(scores_BN > net.score_thresh, scores_BN, torch.zeros_like(scores_BN))
        index_N = torch.arange(scores_BN.shape[1], device=scores_BN.device)
        scores, index = best(scores_BN, net.topk_candidates, index_N[None].expand_as(scores_BN))
        anchor, labels = index // classes, index % classes
        codes = maps["bbox_regression"].float().gather(1, anchor[:, :, None].expand(-1, -1, 4))
        boxes = decoded(net.box_coder, codes, anchors_A4[anchor])
        return clipped(boxes, sizes_B2), scores, labels


def decoded(coder: Any, codes_BN4: Tensor, anchors_BN4: Tensor) -> Tensor:
    """(B, N, 4) xyxy, by torchvision's coder of one or the other kind."""
    decode = getattr(coder, "decode_single", coder.decode)
    return decode(codes_BN4.flatten(0, 1), anchors_BN4.flatten(0, 1)).reshape(codes_BN4.shape)


def level_anchors(generator: AnchorGenerator, images: Tensor, features: list[Tensor]) -> list[Tensor]:
    """float32 (A, 4) of every level: what the generator gives, which changes itself when it is called."""
    height, width = images.shape[-2:]
    levels = []
    for cell_A4, feature in zip(generator.cell_anchors, features, strict=True):
        rows, columns = feature.shape[-2:]
        y = torch.arange(rows, device=images.device) * (height // rows)
        x = torch.arange(columns, device=images.device) * (width // columns)
        y, x = y[:, None].expand(rows, columns).reshape(-1), x[None].expand(rows, columns).reshape(-1)
        shifts = torch.stack([x, y, x, y], dim=1).float()
        levels.append((shifts[:, None] + cell_A4.to(images.device, torch.float32)).reshape(-1, 4))
    return levels
