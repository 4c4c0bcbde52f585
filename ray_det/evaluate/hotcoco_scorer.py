"""Precision and recall by hotcoco, in a fraction of pycocotools' time and with its bits.

hotcoco gets positions for ids: it knows no negative ids, and pycocotools' order of images and classes is that of their
ids. What it would count in another way is brought to it as pycocotools sees it (annotations that share an id), or left
to pycocotools class by class: an annotation with id 0, which pycocotools never finds, and what is not a finite number.

Shape legend: M annotations, N detections.
"""

from __future__ import annotations

import numpy as np
from hotcoco import COCO, COCOeval

from ray_det.data.truth import Annotations
from ray_det.evaluate import pycocotools_scorer
from ray_det.evaluate.pycocotools_scorer import Curves
from ray_det.evaluate.results import Results

_BOX, _SCORE, _LABEL = slice(1, 5), 5, 6
"""Columns of COCO's results as an array: image, xywh, score, category."""


def curves(annotations: Annotations, results: Results, image_ids: np.ndarray, classes: int) -> Curves:
    """See `pycocotools_scorer.curves`.

    Args:
        image_ids: int64, of all images.
        classes: how many there are.

    Raises:
        ValueError: results of an image that is not there.
    """
    truth, found_N7 = read(annotations, results, image_ids := np.unique(image_ids))
    odd_M = (truth.ids_M == 0) | ~np.isfinite(truth.boxes_M4).all(axis=1)
    odd = np.union1d(truth.labels_M[odd_M], found_N7[~np.isfinite(found_N7).all(axis=1), _LABEL].astype(np.int64))
    rest = truth.take(~np.isin(truth.labels_M, odd)), found_N7[~np.isin(found_N7[:, _LABEL], odd)]
    result = _by_hotcoco(*(rest if len(odd) else (truth, found_N7)), len(image_ids), classes)
    for label in odd:
        of_label = truth.take(truth.labels_M == label), found_N7[found_N7[:, _LABEL] == label]
        one = _by_pycocotools(*of_label, len(image_ids), int(label))
        result.precision_TRKAD[:, :, label] = one.precision_TRKAD[:, :, 0]
        result.recall_TKAD[:, label] = one.recall_TKAD[:, 0]
    return result


def ap(truth: Annotations, found_N7: np.ndarray, images: int, classes: int) -> float:
    """COCO's AP of what `read` gives; nothing may be odd. NaN: there are no objects."""
    precision = _by_hotcoco(truth, found_N7, images, classes).precision_TRKAD[:, :, :, 0, -1]
    known = precision[precision > -1]
    return float(known.mean()) if known.size else np.nan


def read(annotations: Annotations, results: Results, image_ids: np.ndarray) -> tuple[Annotations, np.ndarray]:
    """(truth, (N, 7) detections) with positions in `image_ids`, which ascend, for image ids.

    Raises:
        ValueError: results of an image that is not there.
    """
    if len(strange := np.setdiff1d(results.image_ids_I, image_ids)):
        raise ValueError(f"detections of images that the data set has not: {strange[:3].tolist()}")
    position_N = np.searchsorted(image_ids, results.image_of_N)
    found_N7 = np.column_stack([position_N, results.boxes_N4, results.scores_N, results.labels_N])
    return _as_pycocotools_reads(annotations, image_ids), found_N7.astype(np.float64, copy=False)


def _as_pycocotools_reads(annotations: Annotations, image_ids: np.ndarray) -> Annotations:
    """Image by image, in place of each annotation the last of its id; `image_ids_M` become positions.

    Ids become 1, 2, …; those that were 0 stay 0.
    """
    position_M = np.searchsorted(image_ids, annotations.image_ids_M)
    ids, same_M = np.unique(annotations.ids_M, return_inverse=True)
    last = np.empty(len(ids), np.int64)
    last[same_M] = np.arange(len(same_M))  # the last assignment stays
    rows_M = last[same_M][np.argsort(position_M, kind="stable")]
    read = annotations.take(rows_M)
    return read._replace(image_ids_M=position_M[rows_M], ids_M=np.arange(1, len(rows_M) + 1) * (read.ids_M != 0))


def truth_of(truth: Annotations, images: int, classes: int) -> COCO:
    """hotcoco's data set; annotations get the ids 1, 2, … in their order."""
    return COCO.from_arrays(
        [{"id": i} for i in range(images)],
        [{"id": label, "name": str(label)} for label in range(classes)],
        truth.image_ids_M,
        truth.labels_M,
        truth.boxes_M4,
        area=truth.area_M,
        iscrowd=truth.crowd_M,
    )


def _by_hotcoco(truth: Annotations, found_N7: np.ndarray, images: int, classes: int) -> Curves:
    dataset = truth_of(truth, images, classes)
    evaluation = COCOeval(dataset, dataset.load_res(found_N7), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    counted = evaluation.eval
    assert counted is not None
    return Curves(counted["precision"], counted["recall"])


def _by_pycocotools(truth: Annotations, found_N7: np.ndarray, images: int, label: int) -> Curves:
    """Of one class alone, for no class's numbers depend on another's."""
    names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    records = zip(*(column.tolist() for column in truth), strict=True)
    dataset = {
        "images": [{"id": i} for i in range(images)],
        "categories": [{"id": label}],
        "annotations": [dict(zip(names, record, strict=True)) for record in records],
    }
    results = [
        {"image_id": int(row[0]), "category_id": label, "bbox": row[_BOX], "score": row[_SCORE]}
        for row in found_N7.tolist()
    ]
    return pycocotools_scorer.curves(dataset, results)
