"""Targets as perfect predictions: encoded with the library's own box coder, through the adapter's postprocessing and
back to the stored image they are the JSON's boxes again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.ops import box_iou

from ray_det.config import DatasetConfig
from ray_det.data.collate import LoadSpec, Shard, load
from ray_det.data.manifest import Manifest
from ray_det.data.plan import plan_evaluation
from ray_det.data.prepare import prepare
from ray_det.evaluate.inference import to_image
from ray_det.models.build import build_detector
from ray_det.models.detector import Batch, Detector, Prediction, to_device
from ray_det.models.torchvision_adapter import DenseDetector, DenseOutputs, TwoStageDetector
from ray_det.models.transformers_adapter import TransformersDetector
from ray_det.types import Detections, MicroBatch
from tests.models.zoo import CPU, FAMILIES

SURE = 12.0
"""Logit of what is there; minus it, of what is not."""
CLASSES = 3
"""Of the small data set."""
TOLERANCE = 0.5
"""Pixels of the stored image."""


@pytest.fixture(scope="module")
def val(small_coco, tmp_path_factory) -> tuple[Path, Manifest]:
    return small_coco["val"], prepare(str(small_coco["val"]), None, tmp_path_factory.mktemp("cache"))[0]


@pytest.fixture(scope="module", params=FAMILIES)
def detector(request, val) -> Detector:
    torch.manual_seed(0)
    return build_detector(FAMILIES[request.param], val[1].classes)[0].eval()


@pytest.mark.parametrize("resize", ["longest", "square"])
def test_targets_come_back_in_pixels_of_the_stored_image(detector, val, resize):
    source, manifest = val
    wanted = annotated(source, manifest)
    images = 0
    for micro in evaluation_batches(manifest, detector.size_divisor, resize):
        batch = to_device(micro, CPU)
        for i, prediction in enumerate(perfect(detector)(detector, batch)):
            boxes, labels = wanted[int(micro.image_ids_B[i])]
            found = to_image(prediction, micro, i)
            assert found.image_id == micro.image_ids_B[i]
            assert_same_objects(found, boxes, labels)
            images += 1
    assert images == len(manifest)


def test_the_images_are_of_mixed_sizes(val):
    micros = evaluation_batches(val[1], 32, "longest")
    orig = np.concatenate([m.orig_sizes_B2 for m in micros])
    assert len(np.unique(orig, axis=0)) == len(orig) and {True, False} == set((orig[:, 0] > orig[:, 1]).tolist())
    padded = [np.any(m.sizes_B2 < m.pixels_BHW3.shape[1:3], axis=1) for m in micros]
    assert np.concatenate(padded).sum() >= 3
    assert max(len(p) for p in padded) > 1


def annotated(source: Path, manifest: Manifest) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Image id -> (boxes xyxy, labels) of the JSON that may be trained on."""
    data = json.loads(source.read_text())
    table = manifest.table
    flat = (table[name].combine_chunks().flatten().to_pylist() for name in ("annotation_ids", "box_ok"))
    usable = {a for a, ok in zip(*flat, strict=True) if ok}
    wanted: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for image in data["images"]:
        own = [a for a in data["annotations"] if a["image_id"] == image["id"] and a["id"] in usable]
        boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]).reshape(-1, 4)
        labels = [manifest.classes.category_ids.index(a["category_id"]) for a in own]
        wanted[image["id"]] = boxes, np.array(labels, np.int64)
    assert sum(len(labels) for _, labels in wanted.values()) == manifest.counts["trainable_boxes"] > 20
    return wanted


def assert_same_objects(found: Detections, boxes_N4: np.ndarray, labels_N: np.ndarray) -> None:
    """Every object but those that NMS may take for one is found, and nothing else with any certainty."""
    assert (np.diff(found.scores_N) <= 0).all()
    sure = found.scores_N > 0.5
    found_N4, found_N = found.boxes_N4[sure], found.labels_N[sure]
    gaps = np.abs(boxes_N4[:, None] - found_N4[None]).max(axis=-1)
    same = (gaps <= TOLERANCE) & (labels_N[:, None] == found_N[None])
    alone = ~in_conflict(boxes_N4, labels_N)
    assert same[alone].any(axis=1).all(), (boxes_N4, labels_N, found_N4, found_N)
    assert same.any(axis=0).all(), "something that is not there"
    assert len(found_N) <= len(labels_N)


def in_conflict(boxes_N4: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """bool (N,): another box of the same class overlaps by more than 0.5."""
    overlaps = box_iou(torch.from_numpy(boxes_N4), torch.from_numpy(boxes_N4)).fill_diagonal_(0).numpy()
    return ((overlaps > 0.5) & (labels_N[:, None] == labels_N[None])).any(axis=1)


def evaluation_batches(manifest: Manifest, divisor: int, resize: str) -> list[MicroBatch]:
    table = manifest.table
    plan = plan_evaluation(
        table["height"].to_numpy(),
        table["width"].to_numpy(),
        np.arange(len(manifest)),
        DatasetConfig.model_validate({"image_size": 256, "resize": resize}),
        batch_size=3,
        divisor=divisor,
        rank=0,
        world=1,
    )
    return load(Shard(manifest, plan, LoadSpec(resize, "mean", seed=0, augment=None)))


def perfect(detector: Detector) -> Callable[[Any, Batch], list[Prediction]]:
    """What makes, of the targets, a perfect network's answers, and gives them to `postprocess`."""
    if isinstance(detector, DenseDetector):
        return perfect_dense
    return perfect_two_stage if isinstance(detector, TwoStageDetector) else perfect_transformer


def perfect_dense(detector: DenseDetector, batch: Batch) -> list[Prediction]:
    """One anchor of its own for every target."""
    with torch.no_grad():
        outputs = detector.outputs(batch)
    maps = {name: torch.full_like(value, -SURE) for name, value in outputs.maps.items()}
    for i, (anchors, target) in enumerate(zip(outputs.anchors, batch.targets, strict=True)):
        boxes = target["boxes"]
        chosen = nearest_anchors(detector.net, boxes, anchors)
        if isinstance(detector.net, FCOS):
            codes = detector.net.box_coder.encode(anchors[chosen], boxes)
            assert (codes >= 0).all(), "FCOS's head cannot say this"
            maps["bbox_ctrness"][i, chosen] = SURE
        else:
            codes = cast(Any, detector.net).box_coder.encode_single(boxes, anchors[chosen])
        maps["bbox_regression"][i, chosen] = codes
        maps["cls_logits"][i, chosen, target["labels"]] = SURE
    return detector.postprocess(batch, DenseOutputs(maps, outputs.anchors, outputs.per_level))


def nearest_anchors(net: FCOS | RetinaNet, boxes_N4: Tensor, anchors_A4: Tensor) -> Tensor:
    """int64 (N,): anchors, none twice, of the nearest centre (FCOS) or the largest overlap (RetinaNet)."""
    if isinstance(net, FCOS):
        cost_NA = torch.cdist(centres(boxes_N4), centres(anchors_A4))
    else:
        cost_NA = -box_iou(boxes_N4, anchors_A4)
    chosen: list[int] = []
    for cost_A in cost_NA:
        cost_A[chosen] = torch.inf
        chosen.append(int(cost_A.argmin()))
    return torch.tensor(chosen, dtype=torch.int64)


def centres(boxes_N4: Tensor) -> Tensor:
    return (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2


def perfect_two_stage(detector: TwoStageDetector, batch: Batch) -> list[Prediction]:
    """Proposals near the targets; class 0 is the background, every class has its own deltas."""
    boxes = [t["boxes"] for t in batch.targets]
    proposals = [jittered(b, size, seed) for seed, (b, size) in enumerate(zip(boxes, batch.sizes, strict=True))]
    labels = torch.cat([t["labels"] for t in batch.targets]) + 1
    codes = torch.cat(detector.roi_heads.box_coder.encode(boxes, proposals))
    rows, classes = torch.arange(len(labels)), CLASSES + 1
    logits = torch.full((len(labels), classes), -SURE)
    deltas = torch.zeros(len(labels), classes, 4)
    logits[rows, labels] = SURE
    deltas[rows, labels] = codes
    return detector.postprocess(batch, proposals, logits, deltas.flatten(1))


def jittered(boxes_N4: Tensor, size: tuple[int, int], seed: int) -> Tensor:
    """Sides moved by up to a tenth of the box, inside the real pixels, as the first stage's are."""
    noise = torch.rand(boxes_N4.shape, generator=torch.Generator().manual_seed(seed)) * 0.2 - 0.1
    moved = boxes_N4 + noise * (boxes_N4[:, 2:] - boxes_N4[:, :2]).repeat(1, 2)
    return moved.clamp(min=0).minimum(moved.new_tensor([size[1], size[0]] * 2))


def perfect_transformer(detector: TransformersDetector, batch: Batch) -> list[Prediction]:
    """The targets in the last queries; the other queries see nothing in the middle of the canvas."""
    labels = detector.labels(batch)
    config = cast(Any, detector.net.config)
    queries, no_object = config.num_queries, int(config.model_type == "detr")
    logits = torch.full((len(labels), queries, config.num_labels + no_object), -SURE)
    boxes = torch.full((len(labels), queries, 4), 0.5)
    if no_object:
        logits[..., -1] = 0.0
    for i, target in enumerate(labels):
        rows = queries - 1 - torch.arange(len(target["boxes"]))
        logits[i, rows, target["class_labels"]] = SURE - 0.1 * torch.arange(len(rows))
        boxes[i, rows] = target["boxes"]
    return detector.postprocess(batch, logits, boxes)
