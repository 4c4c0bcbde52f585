"""How sure a difference of AP is: the images are drawn again and again, with replacement, for all results alike.

The paired bootstrap of Efron and Tibshirani, An Introduction to the Bootstrap, 1993. Shape legend: I images, S samples,
R results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ray_det.data.manifest import Manifest
from ray_det.data.truth import annotations_of
from ray_det.evaluate import hotcoco_scorer
from ray_det.evaluate.results import Results


class Interval(NamedTuple):
    """A difference, and where 95 % of the samples' differences lie."""

    mean: float
    low: float
    high: float


def ap_of_samples(manifest: Manifest, results: Sequence[Results], samples: int, seed: int = 0) -> np.ndarray:
    """(S, R) COCO's AP of each of the results on `samples` samples of the manifest's images.

    A sample has as many images as the manifest, some of them several times; a class without objects in it does not
    count. NaN where no class has any.
    """
    ids = np.unique(manifest.table["image_id"].to_numpy())
    rng = np.random.default_rng(seed)
    drawn_SI = rng.integers(len(ids), size=(samples, len(ids)))
    truth = annotations_of(manifest)
    aps_SR = np.empty((samples, len(results)))
    for column, result in enumerate(results):
        read, found_N7 = hotcoco_scorer.read(truth, result, ids)
        read = read.take(np.flatnonzero(~np.isnan(read.boxes_M4).any(axis=1)))
        found_N7 = found_N7[~np.isnan(found_N7).any(axis=1)]
        of_truth, of_found = _Rows(read.image_ids_M, len(ids)), _Rows(found_N7[:, 0].astype(np.int64), len(ids))
        for row, drawn_I in enumerate(drawn_SI):
            rows, image_ids = of_truth.of(drawn_I)
            again = read.take(rows)._replace(image_ids_M=image_ids)
            rows, image_ids = of_found.of(drawn_I)
            found = np.column_stack([image_ids, found_N7[rows, 1:]])
            aps_SR[row, column] = hotcoco_scorer.ap(again, found, len(ids), len(manifest.classes))
    return aps_SR


def difference(a_SR: np.ndarray, b_SR: np.ndarray, mean: float, seed: int = 0) -> Interval:
    """Of the mean AP of runs b from that of runs a. Run r of both has one seed: runs are drawn in pairs too.

    Args:
        mean: the difference on the images themselves.
    """
    samples, runs = a_SR.shape
    drawn_SR = np.random.default_rng(seed).integers(runs, size=(samples, runs))
    differences_S = np.take_along_axis(b_SR - a_SR, drawn_SR, axis=1).mean(axis=1)
    low, high = np.nanpercentile(differences_S, (2.5, 97.5))
    return Interval(mean, float(low), float(high))


class _Rows:
    """The rows of each image, of a table with a column of images."""

    def __init__(self, image_of_N: np.ndarray, images: int) -> None:
        self._order = np.argsort(image_of_N, kind="stable")
        self._counts = np.bincount(image_of_N, minlength=images)
        self._starts = np.cumsum(self._counts) - self._counts

    def of(self, drawn_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the drawn images, one image after the other, and the position of its image among the drawn."""
        counts = self._counts[drawn_I]
        position = np.repeat(np.arange(len(drawn_I)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._order[self._starts[drawn_I][position] + within], position
