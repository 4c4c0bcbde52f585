"""Evaluation of a split during training, on all ranks: predict, gather, score, and tell every rank the numbers."""

from __future__ import annotations

from itertools import chain

import numpy as np

from ray_det.data.manifest import Manifest
from ray_det.evaluate.analysis_files import write_analysis
from ray_det.evaluate.gather import from_main, gather_lists
from ray_det.evaluate.inference import Inferred
from ray_det.evaluate.results import Results
from ray_det.evaluate.shown import picture_of
from ray_det.evaluate.split import infer_split, readable_rows, score
from ray_det.report.pictures import Picture
from ray_det.train.session import Session
from ray_det.train.skipped import note_in_evaluation, skipped_in
from ray_det.train.step import sync_buffers


def evaluate_split(session: Session, split: str, *, pictures: int = 0, analysed: bool = False) -> dict[str, float]:
    """COCO metrics and `loss` of a split, the same on every rank; all ranks call it.

    Args:
        pictures: images drawn with their boxes to the tracker.
        analysed: also `best_f1` and its threshold, and the files of an analysis in rank 0's folder.

    Raises:
        TrainingError: more images could not be loaded than `data.max_skipped_share` allows.
    """
    runtime, config, manifest = session.runtime, session.config, session.job.manifests[split]
    session.at("evaluation")
    sync_buffers(session.evaluated)
    shown = _shown(manifest, pictures)
    detections, drawn, losses, skipped = [], [], [], []
    for inferred in infer_split(
        session.evaluated,
        manifest,
        config.data,
        runtime.stream,
        runtime.device,
        batch_size=config.eval.batch_size or session.micro_batches[1],
        rank=runtime.rank,
        world=runtime.world,
        bf16=session.bf16,
        with_loss=True,
    ):
        session.at("evaluation")
        detections += inferred.detections
        losses.append((inferred.batch.step, (inferred.loss or 0.0) * len(inferred.detections)))
        drawn += _pictures(inferred, shown)
        skipped += skipped_in([inferred.batch])
    session.at("gathering and scoring of detections")
    note_in_evaluation(session, split, skipped)
    parts = gather_lists([(Results.of(detections), losses, drawn)], runtime.group)
    metrics: dict[str, float] | None = None
    if parts is not None:
        results = Results.joined([part[0] for part in parts])
        # summed in the order of the batches: the same at every world size
        loss = sum(value for _, value in sorted(chain.from_iterable(part[1] for part in parts)))
        metrics = {"loss": loss / max(len(results.image_ids_I), 1)}
        metrics |= score(manifest, results, config.eval.scorer)
        if analysed:
            metrics |= write_analysis(runtime.folder, split, manifest, results, config.data)
    metrics = from_main(metrics, runtime.group)
    if metrics is None:
        raise RuntimeError("rank 0 has no metrics")
    if session.tracker and parts is not None:  # nobody waits for the drawing
        ordered = sorted(chain.from_iterable(part[2] for part in parts), key=lambda picture: picture.image_id)
        session.tracker.log_pictures(session.state.global_step, ordered, list(manifest.classes.names))
    return metrics


def _shown(manifest: Manifest, count: int) -> set[int]:
    """Ids of a fixed handful of images, spread over the split."""
    rows = readable_rows(manifest)
    picked = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)] if len(rows) else rows
    return set(manifest.table["image_id"].take(picked).to_pylist())


def _pictures(inferred: Inferred, shown: set[int]) -> list[Picture]:
    """Pictures of the batch that are to be shown, at the size that the detector saw."""
    found = enumerate(inferred.detections)
    return [picture_of(inferred.batch, i, own) for i, own in found if own.image_id in shown]
