"""What an actor does: a detector that is loaded once, and shards of images to Parquet parts.

Neither pixels nor detections leave the actor but for the storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import torch

from ray_det.ahead import ahead
from ray_det.data.decode import reason
from ray_det.data.files import READS_AT_ONCE
from ray_det.evaluate.detections_file import detections_table
from ray_det.evaluate.results import Results
from ray_det.evaluate.shown import picture_of
from ray_det.models.compute import set_up_torch
from ray_det.predict.flow import by_canvas
from ray_det.predict.inputs import SHARD, InputImage
from ray_det.predict.output import IMAGES_SCHEMA, Output
from ray_det.predict.predictor import Predictor, open_checkpoint
from ray_det.report.pictures import draw, to_jpeg
from ray_det.train.checkpoint import Checkpoint, sha256
from ray_det.types import Detections, MicroBatch, UserError

WAITING_BATCHES = 4
"""Images that wait for others of their canvas, in batches."""
DRAWN_FROM = 0.3
"""Score from which boxes are drawn where every score is written."""


@dataclass(frozen=True)
class ShardJob:
    """What every actor gets."""

    checkpoint: str
    weights: str  # `fingerprint` of the checkpoint
    read: Callable[[pa.Table], Iterator[InputImage]]
    output: Output
    batch_size: int
    max_bytes: int  # of an image file
    min_score: float
    skip_bad: bool  # an image that cannot be read gets a row that says why; else it ends the prediction
    pictures: frozenset[tuple[int, int]]  # (shard, place in it) of images that are drawn
    gpu: bool
    threads: int
    patience_s: float  # for which a storage may be out of reach


_Fetched = tuple[InputImage, bytes | UserError]
"""An image with the content of its file, or why there is none."""


class _Loaded(NamedTuple):
    """An image that is ready, or why it is not."""

    image: InputImage
    prepared: MicroBatch | None
    problem: str | None


@dataclass
class _Found:
    """What is known of a shard so far; images are named by their place in it."""

    ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    problems: list[str | None] = field(default_factory=list)
    sizes: dict[int, np.ndarray] = field(default_factory=dict)  # (h, w) as stored
    detections: dict[int, Detections] = field(default_factory=dict)


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256, hex: of the file that has those of all others."""
    return sha256(checkpoint.folder / "state.json")


class ShardPredictor:
    """Called with shards of `Inputs`. The detector is loaded at the first call, where an error can be told."""

    def __init__(self, job: ShardJob) -> None:
        self._job = job

    @cached_property
    def _predictor(self) -> Predictor:
        device = torch.device("cuda" if self._job.gpu else "cpu")
        set_up_torch(self._job.threads, None, device)
        cv2.setNumThreads(0)  # images are decoded side by side
        checkpoint = open_checkpoint(self._job.checkpoint, self._job.patience_s)
        if fingerprint(checkpoint) != self._job.weights:
            raise UserError(f"{self._job.checkpoint} has changed since the prediction began: start it again")
        return Predictor(checkpoint, device)

    def __call__(self, shard: pa.Table) -> Iterator[pa.Table]:
        """Write a shard's parts.

        Yields:
            `images`: how many more are done, after every batch and at the end.

        Raises:
            UserError: a checkpoint that cannot be read, or, unless `skip_bad`, an image.
            StorageError: a storage stayed out of reach.
        """
        number, job, predictor = shard[SHARD][0].as_py(), self._job, self._predictor
        found, told = _Found(), 0
        most = WAITING_BATCHES * job.batch_size
        with ThreadPoolExecutor(READS_AT_ONCE) as readers, ThreadPoolExecutor(job.threads) as decoders:
            fetched = ahead(readers, self._fetch, job.read(shard), READS_AT_ONCE)
            loaded = ahead(decoders, partial(self._load, predictor), enumerate(fetched), job.batch_size + job.threads)
            for group in by_canvas(_noted(loaded, found), job.batch_size, most):
                self._detect(predictor, number, MicroBatch.joined(group), found)
                yield pa.table({"images": [len(group)]})
                told += len(group)
        job.output.write_shard(number, *self._tables(predictor, found))
        yield pa.table({"images": [len(found.ids) - told]})

    def _fetch(self, image: InputImage) -> _Fetched:
        try:
            return image, image.read(self._job.max_bytes, self._job.patience_s)
        except UserError as error:
            return image, error

    def _load(self, predictor: Predictor, numbered: tuple[int, _Fetched]) -> _Loaded:
        place, (image, content) = numbered
        try:
            if isinstance(content, UserError):
                raise content
            return _Loaded(image, predictor.prepare(content, place), None)
        except UserError as error:
            if self._job.skip_bad:
                return _Loaded(image, None, _why(error))
            raise UserError(f"image {image.id} cannot be read: {image.name}: {_why(error)}") from error

    def _detect(self, predictor: Predictor, number: int, batch: MicroBatch, found: _Found) -> None:
        (detections,) = predictor.detect([batch])
        for i, one in enumerate(detections):
            found.detections[one.image_id] = one
            if (number, one.image_id) in self._job.pictures:
                picture = picture_of(batch, i, one)
                drawn = draw(picture, predictor.classes.distinct_names, self._job.min_score or DRAWN_FROM)
                self._job.output.write_picture(found.ids[one.image_id], to_jpeg(drawn))

    def _tables(self, predictor: Predictor, found: _Found) -> tuple[pa.Table, pa.Table]:
        """Of detections and of images, in the order of the images."""
        ids, names = np.array(found.ids, np.int64), pa.array(found.names, pa.string())
        results = Results.of([found.detections[place] for place in sorted(found.detections)])
        results = results.take(np.flatnonzero(results.scores_N >= self._job.min_score))
        place_N = results.image_of_N
        table = detections_table(results, names.take(pa.array(place_N)), predictor.classes)
        sizes = [found.sizes.get(place, (None, None)) for place in range(len(ids))]
        counts = np.bincount(place_N, minlength=len(ids))
        columns = (ids, names, [h for h, _ in sizes], [w for _, w in sizes], counts, found.problems)
        arrays = [pa.array(column, kind.type) for column, kind in zip(columns, IMAGES_SCHEMA, strict=True)]
        return table.set_column(0, "image_id", pa.array(ids[place_N])), pa.table(arrays, schema=IMAGES_SCHEMA)


def _noted(loaded: Iterator[_Loaded], found: _Found) -> Iterator[MicroBatch]:
    """The images that can be read; all of them are noted."""
    for place, (image, prepared, problem) in enumerate(loaded):
        found.ids.append(image.id)
        found.names.append(image.name)
        found.problems.append(problem)
        if prepared is not None:
            found.sizes[place] = prepared.orig_sizes_B2[0]
            yield prepared


def _why(error: UserError) -> str:
    """Without the path, which has a column of its own."""
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        return "no such file"
    return str(error) if cause is None else reason(cause)
