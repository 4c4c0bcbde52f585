"""torchvision's FCOS, RetinaNet and Faster R-CNN on a batch that is already resized, padded and normalised.

Their `GeneralizedRCNNTransform` is left out: backbone, head, criterion and postprocessing are called one by one, so
that the network may run under autocast while boxes and losses stay in float32.

Shape legend: B images, H W canvas pixels, N boxes of one image, A anchors of the canvas, R proposals of one image,
C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from ray_det.models.dense_criterion import fcos_losses, retinanet_losses
from ray_det.models.detector import Batch, Detector, Prediction
from ray_det.models.roi_pool import pool_boxes
from ray_det.types import IMAGENET_MEAN

IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DenseOutputs:
    """What a dense head said, in float32."""

    maps: dict[str, Tensor]  # (B, A, C | 4 | 1)
    anchors: list[Tensor]  # (A, 4) xyxy canvas pixels, for every image
    per_level: list[int]  # anchors of every pyramid level, sum A


class DenseDetector(Detector):
    """FCOS and RetinaNet: a head that answers at every anchor.

    Args:
        net: torchvision's own module, whose weight files fit it.
        architecture, pad: see `Detector`.
    """

    net: FCOS | RetinaNet

    def __init__(
        self, net: FCOS | RetinaNet, architecture: dict[str, Any], pad: tuple[float, ...] = IMAGENET_MEAN
    ) -> None:
        super().__init__(IMAGENET_MEAN, IMAGENET_STD, pad)
        self.net = net
        self.architecture = architecture
        names = ("classification", "bbox_regression")
        self.loss_names = (*names, "bbox_ctrness") if isinstance(net, FCOS) else names

    @property
    def backbone(self) -> nn.Module:
        return self.net.backbone.get_submodule("body")

    @property
    def networks(self) -> list[nn.Module]:
        return [self.net.backbone, self.net.head]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return self.criterion(batch, self.outputs(batch))

    def predict(self, batch: Batch) -> list[Prediction]:
        return self.postprocess(batch, self.outputs(batch))

    def loss_and_predict(self, batch: Batch) -> tuple[dict[str, Tensor], list[Prediction]]:
        outputs = self.outputs(batch)
        return self.criterion(batch, outputs), self.postprocess(batch, outputs)

    def outputs(self, batch: Batch) -> DenseOutputs:
        """The network's answers, in the caller's autocast."""
        images = self.normalise(batch)
        features = list(self.net.backbone(images).values())
        maps = {name: value.float() for name, value in self.net.head(features).items()}
        anchors = make_anchors(self.net.anchor_generator, images, batch, features)
        cells = [f.shape[2] * f.shape[3] for f in features]
        per_cell = maps["cls_logits"].shape[1] // sum(cells)
        return DenseOutputs(maps, anchors, [n * per_cell for n in cells])

    @record_function("criterion")
    def criterion(self, batch: Batch, outputs: DenseOutputs) -> dict[str, Tensor]:
        """torchvision's losses, in float32."""
        anchors_A4 = outputs.anchors[0]
        losses = fcos_losses if isinstance(self.net, FCOS) else retinanet_losses
        with full_precision(anchors_A4):
            return total(losses(cast(Any, self.net), batch.targets, outputs.maps, anchors_A4, outputs.per_level))

    def postprocess(self, batch: Batch, outputs: DenseOutputs) -> list[Prediction]:
        """Boxes clipped to the real pixels, after torchvision's thresholds and NMS."""
        with full_precision(outputs.anchors[0]):
            split_maps = {name: list(value.split(outputs.per_level, dim=1)) for name, value in outputs.maps.items()}
            split_anchors = [list(a.split(outputs.per_level)) for a in outputs.anchors]
            found = self.net.postprocess_detections(split_maps, split_anchors, batch.sizes)
        return [Prediction(boxes=d["boxes"], scores=d["scores"], labels=d["labels"]) for d in found]


@dataclass(frozen=True)
class Proposals:
    """What the first stage said; all but the features in float32."""

    features: dict[str, Tensor]  # the pyramid
    canvas: tuple[int, int]  # (h, w)
    anchors: list[Tensor]  # (A, 4) xyxy canvas pixels, for every image
    objectness: Tensor  # (B * A, 1)
    deltas: Tensor  # (B * A, 4)
    boxes: list[Tensor]  # (R, 4) xyxy canvas pixels, for every image, without gradient


class TwoStageDetector(Detector):
    """Faster R-CNN. Inside it label 0 is the background and class c is c + 1.

    In training mode anchors and proposals are sampled with torch's global random state; the loss in eval mode
    samples from a fixed seed, so that it is a function of the batch.
    """

    net: FasterRCNN
    loss_names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")

    def __init__(self, net: FasterRCNN, architecture: dict[str, Any], pad: tuple[float, ...] = IMAGENET_MEAN) -> None:
        super().__init__(IMAGENET_MEAN, IMAGENET_STD, pad)
        self.net = net
        self.architecture = architecture

    @property
    def backbone(self) -> nn.Module:
        return self.net.backbone.get_submodule("body")

    @property
    def networks(self) -> list[nn.Module]:
        return [self.net.backbone, self.rpn.head, self.roi_heads.box_head, self.roi_heads.box_predictor]

    @property
    def rpn(self) -> RegionProposalNetwork:
        return cast(RegionProposalNetwork, self.net.rpn)

    @property
    def roi_heads(self) -> RoIHeads:
        return cast(RoIHeads, self.net.roi_heads)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return self.criterion(batch, self.propose(batch))

    def predict(self, batch: Batch) -> list[Prediction]:
        proposals = self.propose(batch)
        return self.postprocess(batch, proposals.boxes, *self.second_stage(proposals, proposals.boxes))

    def loss_and_predict(self, batch: Batch) -> tuple[dict[str, Tensor], list[Prediction]]:
        proposals = self.propose(batch)
        losses = self.criterion(batch, proposals)
        return losses, self.postprocess(batch, proposals.boxes, *self.second_stage(proposals, proposals.boxes))

    def propose(self, batch: Batch) -> Proposals:
        """Backbone and first stage, in the caller's autocast; boxes decoded in float32."""
        images = self.normalise(batch)
        features: dict[str, Tensor] = self.net.backbone(images)
        levels = list(features.values())
        per_level, deltas_per_level = self.rpn.head(levels)
        anchors = make_anchors(self.rpn.anchor_generator, images, batch, levels)
        with full_precision(images):
            objectness, deltas = concat_box_prediction_layers(
                [level.float() for level in per_level], [level.float() for level in deltas_per_level]
            )
            decoded = self.rpn.box_coder.decode(deltas.detach(), anchors).view(len(images), -1, 4)
            sizes = [level[0].numel() for level in per_level]
            boxes, _ = self.rpn.filter_proposals(decoded, objectness, batch.sizes, sizes)
        canvas = (images.shape[2], images.shape[3])
        return Proposals(features, canvas, anchors, objectness, deltas, boxes)

    def second_stage(self, proposals: Proposals, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (sum R, 1 + C) and deltas (sum R, 4 (1 + C)) in float32; class 0 is the background."""
        pool = cast(MultiScaleRoIAlign, self.roi_heads.box_roi_pool)
        with full_precision(boxes[0]):
            features = {name: level.float() for name, level in proposals.features.items()}
            pooled = pool_boxes(pool, features, boxes, proposals.canvas)
        logits, deltas = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        return logits.float(), deltas.float()

    @record_function("criterion")
    def criterion(self, batch: Batch, proposals: Proposals) -> dict[str, Tensor]:
        """The four losses of the paper (arXiv:1506.01497, with torchvision's weights of 1), in float32."""
        shifted = targets(batch, background=1)
        with self._sampling(proposals.deltas):
            first = self._first_stage_losses(proposals, shifted)
            boxes, _, labels, regression = self.roi_heads.select_training_samples(list(proposals.boxes), shifted)
        logits, deltas = self.second_stage(proposals, boxes)
        with full_precision(logits):
            if len(logits):
                classifier, box_reg = fastrcnn_loss(logits, deltas, labels, regression)
            else:  # neither a box nor a proposal in the micro-batch
                classifier, box_reg = logits.sum(), deltas.sum()
            return total(first | {"loss_classifier": classifier, "loss_box_reg": box_reg})

    def postprocess(self, batch: Batch, boxes: list[Tensor], logits: Tensor, deltas: Tensor) -> list[Prediction]:
        """Boxes clipped to the real pixels, after torchvision's thresholds and NMS."""
        with full_precision(logits):
            found = self.roi_heads.postprocess_detections(logits, deltas, boxes, batch.sizes)
        return [Prediction(boxes=b, scores=s, labels=n - 1) for b, s, n in zip(*found, strict=True)]

    def _first_stage_losses(self, proposals: Proposals, shifted: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        labels, matched = self.rpn.assign_targets_to_anchors(proposals.anchors, shifted)
        regression = self.rpn.box_coder.encode(matched, proposals.anchors)
        objectness, box_reg = self.rpn.compute_loss(proposals.objectness, proposals.deltas, labels, regression)
        return {"loss_objectness": objectness, "loss_rpn_box_reg": box_reg}

    @contextmanager
    def _sampling(self, tensor: Tensor) -> Iterator[None]:
        """float32, and outside training the same sample every time."""
        devices = [tensor.device] if tensor.device.type == "cuda" else []
        with full_precision(tensor), torch.random.fork_rng(devices, enabled=not self.training):
            if not self.training:
                torch.manual_seed(0)
            yield


def full_precision(tensor: Tensor) -> torch.autocast:
    """Leave the caller's autocast on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def make_anchors(generator: AnchorGenerator, images: Tensor, batch: Batch, features: list[Tensor]) -> list[Tensor]:
    """(A, 4) float32 xyxy canvas pixels for every image, whatever the precision of the features."""
    like = [images.new_empty(()).expand(f.shape) for f in features]
    return generator(ImageList(images, batch.sizes), like)


def targets(batch: Batch, background: int = 0) -> list[dict[str, Tensor]]:
    """Boxes and labels as torchvision's criteria take them, labels shifted by the number of background classes."""
    return [{"boxes": t["boxes"], "labels": t["labels"] + background} for t in batch.targets]


def total(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses, detached, with their sum as "loss"."""
    summed = torch.stack(list(losses.values())).sum()
    return {"loss": summed, **{name: value.detach() for name, value in losses.items()}}
