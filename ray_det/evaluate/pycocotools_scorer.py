"""Precision and recall by pycocotools, which is the definition of COCO's metrics."""

from __future__ import annotations

import contextlib
import io
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class Curves(NamedTuple):
    """What COCO's numbers are means of; -1 where a class has no objects of an area range.

    Shape legend: T IoU thresholds, R recall levels, K classes in ascending category id, A area ranges, D largest
    numbers of detections per image.
    """

    precision_TRKAD: np.ndarray  # float64
    recall_TKAD: np.ndarray  # float64


def curves(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> Curves:
    """Both are changed: pycocotools adds keys to the annotations.

    Args:
        ground_truth: a COCO data set.
        results: in COCO's results format, of images of the data set.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(ground_truth)
        # loadRes cannot take an empty list
        found = truth.loadRes(results) if results else _coco(ground_truth | {"annotations": []})
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return Curves(evaluation.eval["precision"], evaluation.eval["recall"])


def _coco(dataset: dict[str, Any]) -> Any:
    coco: Any = COCO()  # its type stubs know files only
    coco.dataset = dataset
    coco.createIndex()
    return coco
