"""COCO's metrics as pycocotools defines them (Lin et al., https://arxiv.org/abs/1405.0312), whichever scorer counts."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from ray_det.config import Scorer
from ray_det.data.manifest import Manifest
from ray_det.data.truth import annotations_of, ground_truth
from ray_det.evaluate import hotcoco_scorer, pycocotools_scorer
from ray_det.evaluate.pycocotools_scorer import Curves
from ray_det.evaluate.results import Results
from ray_det.types import ClassList

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NAMES += ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
"""pycocotools' twelve numbers, in its order, each in 0..1; -1 where the ground truth has no such object."""


def coco_metrics(manifest: Manifest, results: Results, scorer: Scorer = "hotcoco") -> dict[str, float]:
    """The twelve COCO numbers under `NAMES`, and `AP/<class>` for every class; both scorers give the same bits.

    Args:
        results: of images of the manifest; those that they leave out count as images without detections.

    Returns:
        With `ClassList.distinct_names` of the classes.
    """
    classes = manifest.classes
    if scorer == "hotcoco":
        image_ids = manifest.table["image_id"].to_numpy()
        curves = hotcoco_scorer.curves(annotations_of(manifest), results, image_ids, len(classes))
    else:
        curves = pycocotools_scorer.curves(ground_truth(manifest), results.to_coco(classes))
    return _summary(curves) | _per_class(curves, classes)


def _summary(curves: Curves) -> dict[str, float]:
    """By pycocotools itself: a mean's last bit is a matter of the order of its sum."""
    evaluation: Any = COCOeval(iouType="bbox")  # its stubs want fields that summarize does not read
    evaluation.eval = {"precision": curves.precision_TRKAD, "recall": curves.recall_TKAD}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return {name: float(value) for name, value in zip(NAMES, evaluation.stats, strict=True)}


def _per_class(curves: Curves, classes: ClassList) -> dict[str, float]:
    """AP over IoU 0.50:0.95, all areas, 100 detections; -1 for a class without objects."""
    metrics = {}
    for label, name in enumerate(classes.distinct_names):
        values = curves.precision_TRKAD[:, :, label, 0, -1]
        values = values[values > -1]
        metrics[f"AP/{name}"] = float(np.mean(values)) if values.size else -1.0
    return metrics
