"""F1 against the score from which detections are kept, and where it is best.

F1 = 2 TP / (detections + objects) is the harmonic mean of precision and recall.

Shape legend: N detections, K classes, S score thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

THRESHOLDS_S = np.linspace(0, 1, 101)
"""Where curves are sampled."""


class Best(NamedTuple):
    """The largest F1; all are -1 where there are no objects, and the threshold is 1 where nothing is ever right."""

    f1: float
    threshold: float  # detections with at least this score are kept
    precision: float
    recall: float


@dataclass(frozen=True)
class F1:
    """What keeping detections from each score on gives; classes without objects are NaN.

    `micro` counts the detections and objects of all classes together, so that frequent classes dominate. `macro` is
    the mean over the classes that have objects, as in mAP and in Ultralytics' F1 curve; its threshold is one for all.
    """

    macro_S: np.ndarray
    micro_S: np.ndarray
    classes_KS: np.ndarray
    macro: Best
    micro: Best
    classes_K: list[Best]


def f1_of(scores_N: np.ndarray, labels_N: np.ndarray, hits_N: np.ndarray, objects_K: np.ndarray) -> F1:
    """F1 over all scores, exactly: a maximum is one over the scores that occur, not over a grid of thresholds.

    Args:
        hits_N: bool, whether a detection is a true positive. Detections are matched in the order of their scores, so
            those kept by a threshold are matched as they would be alone.
        objects_K: how many there are to find.
    """
    order = np.argsort(-scores_N, kind="stable")
    scores_N, labels_N, hits_N = scores_N[order], labels_N[order], hits_N[order]
    classes = np.flatnonzero(objects_K)
    classes_KS, best_K = np.full((len(objects_K), len(THRESHOLDS_S)), np.nan), [Best(-1, -1, -1, -1)] * len(objects_K)
    steps_N = np.zeros(len(scores_N))  # what each detection adds to the F1 of its class
    for label, rows in zip(classes, _rows_of(labels_N, classes), strict=True):
        f1 = _f1(hits_N[rows], objects_K[label])
        steps_N[rows] = np.diff(f1, prepend=0)
        classes_KS[label] = _sampled(f1, scores_N[rows])
        best_K[label] = _best(f1, scores_N[rows], hits_N[rows], objects_K[label])
    macro_N, micro_N = np.cumsum(steps_N) / max(len(classes), 1), _f1(hits_N, objects_K.sum())
    return F1(
        _sampled(macro_N, scores_N),
        _sampled(micro_N, scores_N),
        classes_KS,
        _best_macro(macro_N, scores_N, labels_N, hits_N, objects_K),
        _best(micro_N, scores_N, hits_N, objects_K.sum()),
        best_K,
    )


def _rows_of(labels_N: np.ndarray, classes: np.ndarray) -> list[np.ndarray]:
    """Positions of each class, ascending."""
    order = np.argsort(labels_N, kind="stable")
    starts, ends = (np.searchsorted(labels_N[order], classes, side) for side in ("left", "right"))
    return [order[start:end] for start, end in zip(starts, ends, strict=True)]


def _f1(hits_N: np.ndarray, objects: int) -> np.ndarray:
    """After each detection, best score first."""
    return 2 * np.cumsum(hits_N) / np.maximum(np.arange(1, len(hits_N) + 1) + objects, 1)


def _sampled(f1_N: np.ndarray, scores_N: np.ndarray) -> np.ndarray:
    kept_S = len(scores_N) - np.searchsorted(scores_N[::-1], THRESHOLDS_S)
    return np.concatenate([[0.0], f1_N])[kept_S]


def _best(f1_N: np.ndarray, scores_N: np.ndarray, hits_N: np.ndarray, objects: int) -> Best:
    if not objects:
        return Best(-1, -1, -1, -1)
    at = _peak(f1_N, scores_N)
    if at is None:
        return Best(0.0, 1.0, 0.0, 0.0)
    right = float(hits_N[: at + 1].sum())
    return Best(float(f1_N[at]), float(scores_N[at]), right / (at + 1), right / float(objects))


def _best_macro(
    f1_N: np.ndarray, scores_N: np.ndarray, labels_N: np.ndarray, hits_N: np.ndarray, objects_K: np.ndarray
) -> Best:
    """Precision and recall are means over classes too; the precision of a class with nothing kept is 0."""
    if not objects_K.any():
        return Best(-1, -1, -1, -1)
    at = _peak(f1_N, scores_N)
    if at is None:
        return Best(0.0, 1.0, 0.0, 0.0)
    kept, there = slice(at + 1), objects_K > 0
    found_K = np.bincount(labels_N[kept], minlength=len(objects_K))[there]
    right_K = np.bincount(labels_N[kept], hits_N[kept], len(objects_K))[there]
    f1_K = 2 * right_K / (found_K + objects_K[there])  # again: the running sum has its rounding
    precision_K, recall_K = right_K / np.maximum(found_K, 1), right_K / objects_K[there]
    return Best(float(f1_K.mean()), float(scores_N[at]), float(precision_K.mean()), float(recall_K.mean()))


def _peak(f1_N: np.ndarray, scores_N: np.ndarray) -> int | None:
    """Where F1 is largest, among the last detections of each score: a threshold keeps all of a score or none."""
    ends = np.flatnonzero(np.append(np.diff(scores_N) != 0, True)[: len(scores_N)])
    if not len(ends) or f1_N[ends].max() <= 1e-12:
        return None
    return int(ends[np.argmax(f1_N[ends])])
