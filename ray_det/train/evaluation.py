"""Evaluation of a split on all ranks: predict, gather, score, and tell every rank the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ray_det.config import micro_batches
from ray_det.data.collate import shard
from ray_det.data.manifest import Manifest
from ray_det.data.plan import plan_evaluation
from ray_det.evaluate.coco_eval import coco_metrics, to_coco
from ray_det.evaluate.gather import gather_lists, require_each_once
from ray_det.evaluate.inference import Inferred, infer
from ray_det.report.pictures import Picture
from ray_det.train.session import Session
from ray_det.train.step import sync_buffers


def evaluate_split(session: Session, split: str, *, pictures: int = 0) -> dict[str, float]:
    """COCO metrics and `loss` of a split, the same on every rank; all ranks call it.

    Images that cannot be read count as images without detections.

    Args:
        pictures: images drawn with their boxes to the tracker.
    """
    manifest = session.job.manifests[split]
    rows = np.flatnonzero(manifest.table["readable"].to_numpy())
    shown = _shown(manifest, rows, pictures)
    found, drawn = [], []
    loss_sum = 0.0
    for inferred in _infer(session, manifest, rows):
        found += inferred.detections
        loss_sum += (inferred.loss or 0.0) * len(inferred.detections)
        drawn += _pictures(inferred, shown)
    everything = gather_lists(found, session.runtime.group)
    all_drawn = gather_lists(drawn, session.runtime.group)
    losses = gather_lists([loss_sum], session.runtime.group)
    metrics: dict[str, float] | None = None
    if everything is not None and all_drawn is not None and losses is not None:
        require_each_once(everything, manifest.table["image_id"].to_numpy()[rows])
        results = to_coco(everything, manifest.classes)
        metrics = {"loss": sum(losses) / max(len(rows), 1)}
        metrics |= coco_metrics(manifest.ground_truth(), results, manifest.classes)
        if session.tracker:
            ordered = sorted(all_drawn, key=lambda picture: picture.image_id)
            session.tracker.log_pictures(session.state.global_step, ordered, list(manifest.classes.names))
    return _from_main(metrics, session.runtime.group)


def _infer(session: Session, manifest: Manifest, rows: np.ndarray) -> Any:
    runtime, config, table = session.runtime, session.config, manifest.table
    plan = plan_evaluation(
        table["height"].to_numpy()[rows],
        table["width"].to_numpy()[rows],
        rows,
        config.data,
        batch_size=config.eval.batch_size or micro_batches(config.train, runtime.world)[1],
        divisor=session.detector.size_divisor,
        rank=runtime.rank,
        world=runtime.world,
        epoch=session.state.epoch,
    )
    sync_buffers(session.detector)
    batches = runtime.stream(shard(manifest, plan, session.load_spec(training=False)))
    torch.manual_seed(config.seed)
    return infer(session.detector, batches, runtime.device, bf16=session.bf16, with_loss=True)


def _shown(manifest: Manifest, rows: np.ndarray, count: int) -> set[int]:
    """Ids of a fixed handful of images, spread over the split."""
    picked = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)] if len(rows) else rows
    return set(manifest.table["image_id"].take(picked).to_pylist())


def _pictures(inferred: Inferred, shown: set[int]) -> list[Picture]:
    """Pictures of the batch that are to be shown, at the size that the detector saw."""
    batch, pictures = inferred.batch, []
    for i, found in enumerate(inferred.detections):
        if found.image_id not in shown:
            continue
        height, width = map(int, batch.sizes_B2[i])
        scale = np.array([width / batch.orig_sizes_B2[i, 1], height / batch.orig_sizes_B2[i, 0]] * 2, np.float32)
        pictures.append(
            Picture(
                image_id=found.image_id,
                pixels_HW3=batch.pixels_BHW3[i, :height, :width].copy(),
                true_boxes_N4=batch.boxes_N4[i],
                true_labels_N=batch.labels_N[i],
                boxes_N4=found.boxes_N4 * scale,
                scores_N=found.scores_N,
                labels_N=found.labels_N,
            )
        )
    return pictures


def _from_main(metrics: dict[str, float] | None, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Rank 0's numbers, on every rank."""
    box = [metrics]
    if group is not None:
        dist.broadcast_object_list(box, group_src=0, group=group)
    if box[0] is None:
        raise RuntimeError("rank 0 has no metrics")
    return box[0]
