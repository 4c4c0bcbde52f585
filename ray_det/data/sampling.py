"""Which images an epoch has where that is not every one once: more often those of rare classes.

Every epoch has the same number of images, so steps and learning rates are known before any is planned.

Shape legend: N images that may be trained on, P pairs of an image and a class that it has, D images of an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_det.config import DatasetConfig
from ray_det.types import UserError

ONE = 1 << 20
"""Repeat factors are whole multiples of 1 / ONE: their sums are exact, the same on every machine."""


@dataclass(frozen=True)
class RepeatFactor:
    """Repeat factor sampling (Gupta et al., "LVIS", https://arxiv.org/abs/1908.03195).

    A class that a share f of the images has gets the factor max(1, sqrt(threshold / f)), an image the largest of its
    classes', 1 without any. That is how often an epoch has it in the mean: each epoch rounds it down or up at random.
    """

    factors_N: np.ndarray  # int64, in units of 1 / ONE

    @property
    def images(self) -> int:
        """Images of an epoch."""
        return -(-int(self.factors_N.sum()) // ONE)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """int64 (D,) indices of images, in the order in which an epoch has them.

        What is rounded up is drawn by systematic sampling (Madow, 1949): each image has the chance that rounding it
        alone would give, but their number is fixed, to one. Where that one is missing, any image takes its place.
        """
        order = rng.permutation(len(self.factors_N))
        ends = np.cumsum(self.factors_N[order] % ONE) + rng.integers(ONE)
        counts = self.factors_N // ONE
        counts[order] += np.diff(ends // ONE, prepend=0)
        drawn = np.repeat(np.arange(len(counts)), counts)
        missing = self.images - len(drawn)
        return rng.permutation(np.append(drawn, rng.integers(len(counts), size=missing)))


@dataclass(frozen=True)
class ClassBalanced:
    """Class-aware sampling (Shen et al., https://arxiv.org/abs/1512.05830): an equal share of an epoch for each class.

    A class's images come round in random order. Images without boxes are never drawn.
    """

    members: tuple[np.ndarray, ...]  # of each class that any image has: indices of its images
    images: int  # of an epoch

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """int64 (D,) indices of images, in the order in which an epoch has them."""
        classes = len(self.members)
        counts = np.full(classes, self.images // classes)
        counts[rng.permutation(classes)[: self.images % classes]] += 1
        rounds = (np.tile(m, (-(-n // len(m)), 1)) for m, n in zip(self.members, counts.tolist(), strict=True))
        turns = (rng.permuted(r, axis=1).ravel()[:n] for r, n in zip(rounds, counts.tolist(), strict=True))
        return rng.permutation(np.concatenate(list(turns)))


Sampler = RepeatFactor | ClassBalanced


def sampler_of(table: pa.Table, rows_N: np.ndarray, config: DatasetConfig) -> Sampler | None:
    """The sampler that `config.sampling` names, of the manifest's rows that may be trained on; None: uniform.

    Only boxes that are trained on count.

    Raises:
        UserError: no image has a box, and classes are to be balanced.
    """
    if config.sampling == "uniform":
        return None
    images_P, classes_P = _pairs(table, rows_N)
    if config.sampling == "repeat_factor":
        return RepeatFactor(repeat_factors(images_P, classes_P, len(rows_N), config.repeat_threshold))
    if not len(images_P):
        raise UserError("data.sampling class_balanced: no image has a box to train on")
    starts = np.flatnonzero(np.diff(classes_P)) + 1
    return ClassBalanced(tuple(np.split(images_P, starts)), len(rows_N))


def repeat_factors(images_P: np.ndarray, classes_P: np.ndarray, images: int, threshold: float) -> np.ndarray:
    """int64 (N,) factors of images in units of 1 / ONE, at least ONE; see `RepeatFactor`."""
    frequency = np.bincount(classes_P) / images
    of_pair = np.maximum(1.0, np.sqrt(threshold / frequency[classes_P]))
    factors = np.full(images, ONE)
    np.maximum.at(factors, images_P, np.round(of_pair * ONE).astype(np.int64))
    return factors


def occurrences(index_D: np.ndarray) -> np.ndarray:
    """int32 (D,): how many times each index came before."""
    order = np.argsort(index_D, kind="stable")
    first = np.diff(index_D[order], prepend=-1) != 0
    starts = np.flatnonzero(first)[np.cumsum(first) - 1]
    result = np.empty(len(order), np.int32)
    result[order] = np.arange(len(order)) - starts
    return result


def _pairs(table: pa.Table, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every image (an index into `rows_N`) with every class that it has a box of, each once, sorted by class."""
    rows = table.select(["labels", "box_ok"]).take(rows_N)
    labels, usable = rows["labels"].combine_chunks(), rows["box_ok"].combine_chunks()
    kept = usable.flatten().to_numpy(zero_copy_only=False)
    image = np.repeat(np.arange(len(rows_N)), pc.call_function("list_value_length", [labels]).to_numpy())
    keys = np.unique(labels.flatten().to_numpy()[kept].astype(np.int64) * len(rows_N) + image[kept])
    return keys % len(rows_N), keys // len(rows_N)
