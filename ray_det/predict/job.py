"""A checkpoint over any number of images, on actors of Ray Data: what `jobs/predict.py` runs.

The driver handles names, never pixels or detections: actors write a shard's parts themselves. A shard whose parts are
there is done, so that the same command goes on where it was killed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy

from ray_det.config import WorkersConfig
from ray_det.data.pipeline import configure
from ray_det.predict.inputs import Inputs
from ray_det.predict.output import COCO, Output, Totals
from ray_det.predict.pool import Pool, find_pool
from ray_det.predict.predictor import open_checkpoint
from ray_det.predict.shards import ShardJob, ShardPredictor, fingerprint
from ray_det.report.progress import ProgressPrinter
from ray_det.storage import Folder
from ray_det.types import TrainingError, UserError, unwrapped

FORMAT = 1
COCO_IMAGES = 1_000_000
"""Images up to which `detections.json` is written unless asked otherwise: readers of it need all of it in memory."""


@dataclass(frozen=True)
class PredictJob:
    """What is asked for; see `jobs/predict.py`."""

    checkpoint: str  # absolute
    inputs: Inputs
    output: Folder
    batch_size: int | None = None  # None: as in the training of the checkpoint
    min_score: float = 0.0
    skip_bad: bool = True
    pictures: int = 0
    coco_json: bool | None = None
    overwrite: bool = False


def predict_images(job: PredictJob, workers: WorkersConfig) -> Totals:
    """Write the detections of all images, but for shards that are there already.

    Raises:
        UserError: an output of something else, no room for workers, a checkpoint that cannot be read, an image that
            cannot be read unless these are skipped, or not one that can.
        StorageError: a storage stayed out of reach.
    """
    patience_s = workers.storage_timeout_s
    output, inputs, checkpoint = Output(job.output), job.inputs, open_checkpoint(job.checkpoint, patience_s)
    weights, run = fingerprint(checkpoint), checkpoint.config
    output.claim(made_of(job, weights), job.overwrite)
    done = output.done()
    todo = [number for number in range(len(inputs.shards)) if number not in done]
    if todo:
        pool = find_pool(workers, len(todo))
        shard_job = ShardJob(
            job.checkpoint,
            weights,
            inputs.read,
            output,
            job.batch_size or run.eval.batch_size or run.train.micro_batch_size or run.train.global_batch_size,
            run.data.max_bytes,
            job.min_score,
            job.skip_bad,
            _chosen(inputs, job.pictures),
            pool.gpu,
            pool.threads,
            patience_s,
        )
        _run(shard_job, inputs, todo, pool)
    totals = output.write_skipped(len(inputs.shards))
    if totals.images != inputs.images:
        raise RuntimeError(f"{totals.images} of {inputs.images} images are in {job.output.uri}")
    if totals.unreadable == totals.images:
        raise UserError(f"none of the {totals.images} images can be read, for example {totals.problems[0]}")
    if job.coco_json or (job.coco_json is None and inputs.images <= COCO_IMAGES):
        if todo or not job.output.exists(COCO):
            output.write_coco(len(inputs.shards))
    return totals


def made_of(job: PredictJob, weights: str) -> dict[str, Any]:
    """What a prediction must have in common with the one that it goes on with."""
    inputs = job.inputs
    about = {"format": FORMAT, "checkpoint": weights, "input": inputs.digest, "images": inputs.images}
    return about | {"shard_images": inputs.shard_images, "min_score": job.min_score, "pictures": job.pictures}


def _run(job: ShardJob, inputs: Inputs, todo: list[int], pool: Pool) -> None:
    """Have actors write these shards, and say how far they are."""
    progress = _Progress(inputs.images, inputs.images - sum(inputs.counts[number] for number in todo))
    configure(ray.data.DataContext.get_current())
    dataset = ray.data.from_arrow([inputs.shards[number] for number in todo]).map_batches(
        ShardPredictor,
        fn_constructor_args=(job,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=pool.actors),
        num_cpus=pool.cpus,
        num_gpus=int(pool.gpu),
    )
    try:
        for row in dataset.iter_rows():
            progress.add(row["images"])
    except (UserError, TrainingError) as error:
        raise unwrapped(error) from None
    finally:
        progress.close()


def _chosen(inputs: Inputs, pictures: int) -> frozenset[tuple[int, int]]:
    """(shard, place in it) of so many images, evenly over all."""
    ends = np.cumsum(inputs.counts)
    at = np.unique(np.linspace(0, inputs.images - 1, min(pictures, inputs.images)).round().astype(np.int64))
    number = np.searchsorted(ends, at, side="right")
    place = at - (ends - inputs.counts)[number]
    return frozenset(zip(number.tolist(), place.tolist(), strict=True))


class _Progress:
    """Images per second from the first batch on, which waits for Ray and the detector."""

    def __init__(self, images: int, done: int) -> None:
        self._images, self._done = images, done
        self._first: tuple[float, int] | None = None
        self._printer = ProgressPrinter()
        if done:
            self._printer.update({"message": f"{done} of {images} images are done already"})

    def add(self, images: int) -> None:
        self._done += images
        now = time.monotonic()
        if self._first is None:
            self._first = now, self._done
        state: dict[str, Any] = {"global_step": self._done, "total_steps": self._images, "phase": "images"}
        seconds, more = now - self._first[0], self._done - self._first[1]
        if more and seconds > 0:
            state |= {"images_per_s": more / seconds, "eta_s": (self._images - self._done) * seconds / more}
        self._printer.update(state)

    def close(self) -> None:
        self._printer.close()
