"""Which images an evaluation is of: each rank's part of them in batches, and the scoring of all."""

from __future__ import annotations

import numpy as np

from ray_det.config import DatasetConfig, Scorer
from ray_det.data.collate import Shard
from ray_det.data.image import LoadSpec
from ray_det.data.manifest import Manifest
from ray_det.data.plan import plan_evaluation
from ray_det.evaluate.coco_eval import coco_metrics
from ray_det.evaluate.gather import require_each_once
from ray_det.evaluate.results import Results
from ray_det.retry import PATIENCE_S


def readable_rows(manifest: Manifest) -> np.ndarray:
    """int64 rows of the images that can be predicted."""
    return np.flatnonzero(manifest.table["readable"].to_numpy())


def evaluation_shard(
    manifest: Manifest,
    data: DatasetConfig,
    *,
    batch_size: int,
    divisor: int,
    rank: int = 0,
    world: int = 1,
    patience_s: float = PATIENCE_S,
) -> Shard:
    """Rank `rank`'s share of a manifest's readable images, each exactly once over all ranks.

    Args:
        patience_s: seconds for which a remote storage of the images may be out of reach.
    """
    rows, table = readable_rows(manifest), manifest.table
    plan = plan_evaluation(
        table["height"].to_numpy()[rows],
        table["width"].to_numpy()[rows],
        rows,
        data,
        batch_size=batch_size,
        divisor=divisor,
        rank=rank,
        world=world,
    )
    skip_bad = data.on_bad_image == "skip"
    spec = LoadSpec(data.resize, data.padding, 0, None, data.limits, skip_bad, patience_s, data.scaled_decode)
    return Shard(manifest, plan, spec)


def score(manifest: Manifest, results: Results, scorer: Scorer) -> dict[str, float]:
    """COCO metrics of a whole split. Images that cannot be read count as images without detections.

    Raises:
        RuntimeError: the results are not of every readable image exactly once.
    """
    require_each_once(results, manifest.table["image_id"].to_numpy()[readable_rows(manifest)])
    return coco_metrics(manifest, results, scorer)
