"""Evaluation of a split during training: each rank predicts its part, the parts are scored together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from ray_det.config import TrainJobConfig
from ray_det.data.collate import Shard
from ray_det.data.manifest import Manifest
from ray_det.evaluate.analysis_files import write_analysis
from ray_det.evaluate.detections_file import FILE, in_order_of_images, write_detections
from ray_det.evaluate.gather import from_main, gather_lists
from ray_det.evaluate.inference import Inferred, infer
from ray_det.evaluate.results import Results
from ray_det.evaluate.shown import picture_of
from ray_det.evaluate.split import readable_rows, score
from ray_det.models.compute import use_bf16
from ray_det.models.detector import Detector
from ray_det.report.pictures import Picture
from ray_det.train.checkpoint import Checkpoint
from ray_det.train.session import Session
from ray_det.train.skipped import Skipped, note_in_evaluation, skipped_in
from ray_det.train.step import sync_buffers
from ray_det.train.work import evaluation_of
from ray_det.types import MicroBatch, UserError

Stream = Callable[[Shard], Iterator[MicroBatch]]
"""Loads a shard's micro-batches, in order."""


@dataclass(frozen=True)
class Part:
    """What one rank found."""

    results: Results
    losses: list[tuple[int, float]]  # (number of the batch, its loss summed over its images)
    pictures: list[Picture]
    skipped: list[Skipped]


@dataclass(frozen=True)
class Evaluated:
    """What all of them found together."""

    results: Results
    metrics: dict[str, float]  # COCO's, and `loss`
    pictures: list[Picture]
    skipped: list[Skipped]


def evaluate_split(session: Session, split: str, *, pictures: int = 0, analysed: bool = False) -> dict[str, float]:
    """COCO metrics and `loss` of a split, the same on every rank; all ranks call it.

    Args:
        pictures: images drawn with their boxes to the tracker.
        analysed: also `best_f1` and its threshold, and the files of an analysis in rank 0's folder.

    Raises:
        TrainingError: more images could not be loaded than `data.max_skipped_share` allows.
    """
    runtime, manifest = session.runtime, session.job.manifests[split]
    session.at("evaluation")
    sync_buffers(session.evaluated)
    work = session.work.validation if split == "val" else session.work.evaluation(split)
    alive = partial(session.at, "evaluation")
    part = infer_part(session.evaluated, work, session.config, runtime.stream, runtime.device, alive, pictures)
    session.at("gathering and scoring of detections")
    note_in_evaluation(session, split, part.skipped, session.state.global_step)
    parts = gather_lists([part], runtime.group)
    evaluated = join(parts, manifest, session.config) if parts is not None else None
    if evaluated and analysed:
        patience_s = session.config.workers.storage_timeout_s
        numbers = write_analysis(runtime.folder, split, manifest, evaluated.results, session.config.data, patience_s)
        evaluated.metrics.update(numbers)
        write_detections(runtime.folder / FILE, in_order_of_images(evaluated.results, manifest), manifest)
    metrics = from_main(evaluated and evaluated.metrics, runtime.group)
    if metrics is None:
        raise RuntimeError("rank 0 has no metrics")
    if session.tracker and evaluated:  # nobody waits for the drawing
        names = list(manifest.classes.distinct_names)
        session.tracker.log_pictures(session.state.global_step, evaluated.pictures, names)
    return metrics


def evaluate_checkpoint(
    folder: Path,
    config: TrainJobConfig,
    manifest: Manifest,
    stream: Stream,
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
) -> Evaluated | None:
    """What `evaluate_split` finds with these weights on one rank; None: the checkpoint is broken."""
    try:
        checkpoint = Checkpoint.open(folder)
    except UserError:
        return None
    detector = checkpoint.build(device)
    work = evaluation_of(manifest, config, detector.size_divisor)
    part = infer_part(detector, work, config, stream, device, alive, config.eval.pictures)
    return join([part], manifest, config)


def infer_part(
    detector: Detector,
    work: Shard,
    config: TrainJobConfig,
    stream: Stream,
    device: torch.device,
    alive: Callable[[], None],
    pictures: int,
) -> Part:
    """A rank's part of a split.

    Args:
        alive: called after every batch.
        pictures: how many images of the whole split are drawn.
    """
    shown, bf16 = _shown(work.manifest, pictures), use_bf16(config.train.precision, device)
    detections, losses, drawn, skipped = [], [], [], []
    for inferred in infer(detector, stream(work), device, bf16=bf16, with_loss=True):
        alive()
        detections += inferred.detections
        losses.append((inferred.batch.step, (inferred.loss or 0.0) * len(inferred.detections)))
        drawn += _pictures(inferred, shown)
        skipped += skipped_in([inferred.batch])
    return Part(Results.of(detections), losses, drawn, skipped)


def join(parts: list[Part], manifest: Manifest, config: TrainJobConfig) -> Evaluated:
    """The parts of all ranks, scored."""
    results = Results.joined([part.results for part in parts])
    # summed in the order of the batches: the same at every world size
    loss = sum(value for _, value in sorted(chain.from_iterable(part.losses for part in parts)))
    metrics = {"loss": loss / max(len(results.image_ids_I), 1)} | score(manifest, results, config.eval.scorer)
    pictures = sorted(chain.from_iterable(part.pictures for part in parts), key=lambda picture: picture.image_id)
    return Evaluated(results, metrics, pictures, list(chain.from_iterable(part.skipped for part in parts)))


def _shown(manifest: Manifest, count: int) -> set[int]:
    """Ids of a fixed handful of images, spread over the split."""
    rows = readable_rows(manifest)
    picked = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)] if len(rows) else rows
    return set(manifest.table["image_id"].take(picked).to_pylist())


def _pictures(inferred: Inferred, shown: set[int]) -> list[Picture]:
    """Pictures of the batch that are to be shown, at the size that the detector saw."""
    found = enumerate(inferred.detections)
    return [picture_of(inferred.batch, i, own) for i, own in found if own.image_id in shown]
