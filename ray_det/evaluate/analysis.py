"""What is right and what is wrong among detections, at IoU 0.5, and which images are worst.

hotcoco matches and counts. Detections are judged as COCO judges them: the 100 best of an image and class, and none that
lies in a crowd of its class. What is not a number is left out.

Shape legend: I images, M annotations, N detections, K classes, R recall levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from hotcoco import COCO, COCOeval

from ray_det.data.manifest import Manifest
from ray_det.data.truth import Annotations, annotations_of
from ray_det.evaluate import hotcoco_scorer
from ray_det.evaluate.f1 import F1, f1_of
from ray_det.evaluate.results import Results

IOU, BACKGROUND_IOU, MAX_DETECTIONS = 0.5, 0.1, 100
WORST = 12

ERRORS = {
    "classification": "Cls",
    "localization": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}
"""Kinds of errors of TIDE (Bolya et al. 2020, https://arxiv.org/abs/2008.08115) and what hotcoco calls them."""


class ImageErrors(NamedTuple):
    """One image at the score of the best F1."""

    image_id: int
    f1: float
    right: int  # detections
    wrong: int  # detections
    missed: int  # objects


@dataclass(frozen=True)
class Analysis:
    """See `analyse`."""

    images: int
    objects_K: np.ndarray  # int64, crowds left out
    precision_RK: np.ndarray  # at recalls 0, 0.01, …, 1, as COCO interpolates it; its mean is AP50. NaN without objects
    f1: F1
    confusion_KK: np.ndarray  # int64 (K + 1, K + 1): true classes x found ones, the last of both: no partner
    error_counts: dict[str, int]  # by the names of ERRORS
    error_dap: dict[str, float]  # by which AP50 grows where errors of one kind, and no others, are put right
    worst: list[ImageErrors]


class _Counted(NamedTuple):
    """What COCO counts, with columns of its own; images are positions among all."""

    found_N7: np.ndarray  # as `hotcoco_scorer.read` gives them
    images_N: np.ndarray
    labels_N: np.ndarray
    scores_N: np.ndarray
    hits_N: np.ndarray  # bool: true positives
    objects: Annotations


def analyse(manifest: Manifest, results: Results) -> Analysis:
    """Precision, F1, confusions, kinds of errors and worst images.

    The confusion matrix and the images are those of the detections that the best mean F1 keeps. In the matrix a
    detection may be matched with an object of any class, the best score first; IoU is what decides, 0.5 at least.

    Args:
        results: of images of the manifest; those that they leave out count as images without detections, and are
            not among the worst.

    Raises:
        ValueError: results of an image that the manifest has not.
    """
    image_ids = np.unique(manifest.table["image_id"].to_numpy())
    truth, found_N7 = hotcoco_scorer.read(annotations_of(manifest), results, image_ids)
    truth = truth.take(np.flatnonzero(~np.isnan(truth.boxes_M4).any(axis=1)))
    found_N7 = found_N7[~np.isnan(found_N7).any(axis=1)]
    classes = len(manifest.classes)
    evaluation = _evaluation(hotcoco_scorer.truth_of(truth, len(image_ids), classes), found_N7)
    counted = _counted(evaluation, truth, found_N7)
    objects_K = np.bincount(counted.objects.labels_M, minlength=classes)
    f1 = f1_of(counted.scores_N, counted.labels_N, counted.hits_N, objects_K)
    kept_N = counted.scores_N >= f1.macro.threshold
    # hotcoco would take crowds for objects that a detection is near, and what lies in them for errors.
    objects = hotcoco_scorer.truth_of(counted.objects, len(image_ids), classes)
    errors = _evaluation(objects, counted.found_N7).tide_errors(IOU, BACKGROUND_IOU)
    curves: Any = evaluation.eval
    precision_RK = curves["precision"][0, :, :, 0, 0]
    return Analysis(
        images=len(results.image_ids_I),
        objects_K=objects_K,
        precision_RK=np.where(precision_RK < 0, np.nan, precision_RK),
        f1=f1,
        confusion_KK=_confusion(objects, counted.found_N7[kept_N]),
        error_counts={name: errors["counts"][key] for name, key in ERRORS.items()},
        error_dap={name: errors["delta_ap"][key] for name, key in ERRORS.items()},
        worst=_worst(counted, kept_N, image_ids, results.image_ids_I),
    )


def _evaluation(dataset: COCO, found_N7: np.ndarray) -> COCOeval:
    """At one IoU and for all sizes of objects."""
    evaluation = COCOeval(dataset, dataset.load_res(found_N7), "bbox")
    params: Any = evaluation.params
    params.iouThrs, params.maxDets = [IOU], [MAX_DETECTIONS]
    params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _counted(evaluation: COCOeval, truth: Annotations, found_N7: np.ndarray) -> _Counted:
    status = evaluation.image_diagnostics(IOU, score_thr=np.inf)  # inf: it looks for no errors of the labels
    # hotcoco's ids count from 1; what does not count has no status.
    rows, hits, objects = (
        np.sort(np.fromiter(status[key], np.int64)) - 1 for key in ("dt_status", "dt_match", "gt_status")
    )
    found_N7 = found_N7[rows]
    images_N, labels_N = found_N7[:, [0, -1]].astype(np.int64).T
    return _Counted(found_N7, images_N, labels_N, found_N7[:, -2], np.isin(rows, hits), truth.take(objects))


def _confusion(dataset: COCO, found_N7: np.ndarray) -> np.ndarray:
    evaluation = COCOeval(dataset, dataset.load_res(found_N7), "bbox")
    most = max(len(found_N7), 1)  # all: the 100 best are taken already
    return evaluation.confusion_matrix(iou_thr=IOU, max_det=most)["matrix"].astype(np.int64)


def _worst(counted: _Counted, kept_N: np.ndarray, image_ids: np.ndarray, looked_at_I: np.ndarray) -> list[ImageErrors]:
    """Images with errors, the lowest F1 first, and of those that share it the one with the most errors."""
    found, right, objects = (
        np.bincount(images, minlength=len(image_ids))
        for images in (
            counted.images_N[kept_N],
            counted.images_N[kept_N & counted.hits_N],
            counted.objects.image_ids_M,
        )
    )
    errors = found + objects - 2 * right
    f1 = 2 * right / np.maximum(found + objects, 1)
    candidates = np.flatnonzero((errors > 0) & np.isin(image_ids, looked_at_I))
    order = candidates[np.lexsort((-errors[candidates], f1[candidates]))][:WORST]
    columns = image_ids, f1, right, found - right, objects - right
    return [ImageErrors(*values) for values in zip(*(column[order].tolist() for column in columns), strict=True)]
