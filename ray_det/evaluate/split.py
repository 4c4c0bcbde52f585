"""One rank's part of an evaluation: which images, in which batches, to detections."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from ray_det.config import DatasetConfig, Scorer
from ray_det.data.collate import Shard
from ray_det.data.image import LoadSpec
from ray_det.data.manifest import Manifest
from ray_det.data.plan import plan_evaluation
from ray_det.evaluate.coco_eval import coco_metrics
from ray_det.evaluate.gather import require_each_once
from ray_det.evaluate.inference import Inferred, infer
from ray_det.evaluate.results import Results
from ray_det.models.detector import Detector
from ray_det.types import MicroBatch

Stream = Callable[[Shard], Iterator[MicroBatch]]
"""Loads a shard's micro-batches, in order."""


def readable_rows(manifest: Manifest) -> np.ndarray:
    """int64 rows of the images that can be predicted."""
    return np.flatnonzero(manifest.table["readable"].to_numpy())


def infer_split(
    detector: Detector,
    manifest: Manifest,
    data: DatasetConfig,
    stream: Stream,
    device: torch.device,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    bf16: bool = False,
    with_loss: bool = False,
) -> Iterator[Inferred]:
    """Run the detector over rank `rank`'s share of a manifest's readable images, each exactly once over all ranks."""
    rows, table = readable_rows(manifest), manifest.table
    plan = plan_evaluation(
        table["height"].to_numpy()[rows],
        table["width"].to_numpy()[rows],
        rows,
        data,
        batch_size=batch_size,
        divisor=detector.size_divisor,
        rank=rank,
        world=world,
    )
    skip_bad = data.on_bad_image == "skip"
    spec = LoadSpec(data.resize, data.padding, 0, None, data.limits, skip_bad, scaled_decode=data.scaled_decode)
    batches = stream(Shard(manifest, plan, spec))
    yield from infer(detector, batches, device, bf16=bf16, with_loss=with_loss)


def score(manifest: Manifest, results: Results, scorer: Scorer) -> dict[str, float]:
    """COCO metrics of a whole split. Images that cannot be read count as images without detections.

    Raises:
        RuntimeError: the results are not of every readable image exactly once.
    """
    require_each_once(results, manifest.table["image_id"].to_numpy()[readable_rows(manifest)])
    return coco_metrics(manifest, results, scorer)
