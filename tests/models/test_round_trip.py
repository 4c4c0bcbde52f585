"""Targets encoded as a perfect network's outputs come back through the postprocessing, on mixed sizes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from ray_det.models.detector import Batch, Prediction
from ray_det.models.torchvision_adapter import DenseDetector, DenseOutputs, TwoStageDetector, targets
from ray_det.models.transformers_adapter import TransformersDetector
from tests.models.zoo import CLASSES, DETRS, batch, build

SURE = 12.0  # logit


def assert_returned(pictures: Batch, predictions: list[Prediction]) -> None:
    for target, found in zip(pictures.targets, predictions, strict=True):
        sure = found["scores"] > 0.5
        assert sure.sum() == len(target["labels"])
        distances = torch.cdist(target["boxes"], found["boxes"][sure], p=float("inf"))
        nearest = distances.min(dim=1)
        assert (nearest.values < 0.5).all()
        assert torch.equal(found["labels"][sure][nearest.indices], target["labels"])


@pytest.mark.parametrize("family", ["fcos", "retinanet"])
def test_dense_detectors(family):
    pictures = batch(8)
    detector = cast(DenseDetector, build(family).eval())
    with torch.inference_mode():
        outputs = detector.outputs(pictures)
    perfect = DenseOutputs({k: torch.full_like(v, -SURE) for k, v in outputs.maps.items()}, outputs.anchors, [])
    for image, target in enumerate(pictures.targets):
        anchors = outputs.anchors[image]
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            anchor = int(best_anchor(family, anchors, box))
            deltas = encode(detector, anchors[anchor : anchor + 1], box[None])
            perfect.maps["bbox_regression"][image, anchor] = deltas
            perfect.maps["cls_logits"][image, anchor, label] = SURE
            if "bbox_ctrness" in perfect.maps:
                perfect.maps["bbox_ctrness"][image, anchor] = SURE
    perfect = DenseOutputs(perfect.maps, outputs.anchors, outputs.per_level)
    assert_returned(pictures, detector.postprocess(pictures, perfect))


def best_anchor(family: str, anchors: Tensor, box: Tensor) -> Tensor:
    """By IoU; for FCOS the smallest whose centre is nearest to the box's."""
    if family == "retinanet":
        return box_iou(anchors, box[None]).argmax()
    centre = (box[:2] + box[2:]) / 2
    return ((anchors[:, :2] + anchors[:, 2:]) / 2 - centre).abs().amax(1).argmin()


def encode(detector: DenseDetector, anchors: Tensor, boxes: Tensor) -> Tensor:
    coder: Any = detector.net.box_coder
    if hasattr(coder, "encode_single"):
        return coder.encode_single(boxes, anchors)[0]
    return coder.encode(anchors, boxes)[0]


def test_faster_rcnn():
    pictures = batch(8)
    detector = cast(TwoStageDetector, build("fasterrcnn").eval())
    torch.manual_seed(0)
    truth = targets(pictures, background=1)
    proposals = [t["boxes"] + 3 * torch.randn_like(t["boxes"]) for t in truth]
    deltas_per_image = detector.roi_heads.box_coder.encode([t["boxes"] for t in truth], proposals)
    labels = torch.cat([t["labels"] for t in truth])
    logits = torch.full((len(labels), 1 + len(CLASSES)), -SURE)
    logits[torch.arange(len(labels)), labels] = SURE
    deltas = torch.cat(list(deltas_per_image)).repeat(1, 1 + len(CLASSES))
    assert_returned(pictures, detector.postprocess(pictures, proposals, logits, deltas))


@pytest.mark.parametrize("family", DETRS)
def test_transformers(family):
    pictures = batch(8)
    detector = cast(TransformersDetector, build(family).eval())
    classes = len(CLASSES) + (family == "detr")
    logits, boxes = torch.full((8, 20, classes), -SURE), torch.full((8, 20, 4), 0.5)
    if family == "detr":
        logits[..., -1] = 0.0  # no object
    for image, labels in enumerate(detector.labels(pictures)):
        for query, (box, label) in enumerate(zip(labels["boxes"], labels["class_labels"], strict=True)):
            boxes[image, -1 - query] = box
            logits[image, -1 - query, label] = SURE
    assert_returned(pictures, detector.postprocess(pictures, logits, boxes))


@pytest.mark.parametrize("family", DETRS)
def test_the_criterion_of_transformers_finds_them_perfect(family):
    """Labels and the criterion agree on the format: the box losses of true boxes are zero."""
    pictures = batch(8)
    detector = cast(TransformersDetector, build(family).eval())
    labels = detector.labels(pictures)
    with torch.inference_mode():
        outputs = detector.outputs(pictures, labels)
        boxes = torch.full_like(outputs.pred_boxes, 0.5)
        for image, label in enumerate(labels):
            boxes[image, : len(label["boxes"])] = label["boxes"]
        detector.net.config.auxiliary_loss = False
        _, parts, _ = detector.net.loss_function(
            outputs.logits, labels, torch.device("cpu"), boxes, detector.net.config, None, None
        )
    assert parts["loss_bbox"] < 1e-5 and parts["loss_giou"] < 1e-5
