"""COCO's metrics by pycocotools, which is the definition of them (Lin et al., https://arxiv.org/abs/1405.0312)."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ray_det import boxes as box_ops
from ray_det.types import ClassList, Detections

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NAMES += ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
"""pycocotools' twelve numbers, in its order, each in 0..1; -1 where the ground truth has no such object."""


def to_coco(detections: list[Detections], classes: ClassList) -> list[dict[str, Any]]:
    """COCO's results format: xywh boxes in pixels and COCO category ids."""
    results: list[dict[str, Any]] = []
    for found in detections:
        boxes = box_ops.xyxy_to_xywh(found.boxes_N4).tolist()
        for box, score, label in zip(boxes, found.scores_N.tolist(), found.labels_N.tolist(), strict=True):
            results.append(
                {
                    "image_id": found.image_id,
                    "category_id": classes.category_ids[label],
                    "bbox": box,
                    "score": score,
                }
            )
    return results


def coco_metrics(ground_truth: dict[str, Any], results: list[dict[str, Any]], classes: ClassList) -> dict[str, float]:
    """The twelve COCO numbers under `NAMES`, and `AP/<class name>` for every class.

    Args:
        ground_truth: a COCO data set, as `Manifest.ground_truth` gives it.
        results: from `to_coco`, of every image.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(ground_truth)
        # loadRes cannot take an empty list
        found = truth.loadRes(results) if results else _coco(ground_truth | {"annotations": []})
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {name: float(value) for name, value in zip(NAMES, evaluation.stats, strict=True)}
    return metrics | _per_class(evaluation, classes)


def _per_class(evaluation: COCOeval, classes: ClassList) -> dict[str, float]:
    """AP over IoU 0.50:0.95, all areas, 100 detections; -1 for a class without objects."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class)
    metrics = {}
    for name, category_id in zip(classes.names, classes.category_ids, strict=True):
        values = precision[:, :, evaluation.params.catIds.index(category_id)]
        values = values[values > -1]
        metrics[f"AP/{name}"] = float(np.mean(values)) if values.size else -1.0
    return metrics


def _coco(dataset: dict[str, Any]) -> Any:
    coco: Any = COCO()  # its type stubs know files only
    coco.dataset = dataset
    coco.createIndex()
    return coco
