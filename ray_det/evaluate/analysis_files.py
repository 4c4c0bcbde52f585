"""An analysis as the files that a report shows: `analysis.json`, and pictures of the worst images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ray_det import boxes as box_ops
from ray_det.config import DatasetConfig
from ray_det.data.collate import LoadSpec, Shard, load
from ray_det.data.manifest import Manifest
from ray_det.data.plan import plan_evaluation
from ray_det.evaluate.analysis import BACKGROUND_IOU, IOU, Analysis, analyse
from ray_det.evaluate.f1 import THRESHOLDS_S, Best
from ray_det.evaluate.results import Results
from ray_det.evaluate.shown import picture_of
from ray_det.report.analysis_page import FILE, PICTURES
from ray_det.report.pictures import Picture, draw, to_jpeg
from ray_det.retry import PATIENCE_S
from ray_det.types import Detections

PICTURE_SIZE = 640  # pixels of the longest side
DIGITS = 5


def write_analysis(
    folder: Path,
    split: str,
    manifest: Manifest,
    results: Results,
    data: DatasetConfig,
    patience_s: float = PATIENCE_S,
) -> dict[str, float]:
    """Write `analysis.json` and `worst_images/*.jpg` into a local folder, in place of older ones.

    Args:
        data: how images may be read; those that cannot be have no picture.
        patience_s: seconds for which a remote storage of the images may be out of reach.

    Returns:
        `best_f1`, its `_threshold`, `_precision` and `_recall`: of the mean over classes.

    Raises:
        OSError: the folder cannot be written.
    """
    analysis = analyse(manifest, results)
    pictures = folder / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.jpg"):
        old.unlink()
    names = {}
    for image_id, picture in _worst_pictures(analysis, manifest, results, data, patience_s).items():
        names[image_id] = f"image_{image_id}.jpg"
        drawn = draw(picture, manifest.classes.distinct_names, min_score=analysis.f1.macro.threshold)
        (pictures / names[image_id]).write_bytes(to_jpeg(drawn))
    content = {"split": split} | to_json(analysis, manifest, names)
    (folder / FILE).write_text(json.dumps(content))
    best = analysis.f1.macro._asdict()
    return {"best_f1": best.pop("f1")} | {f"best_f1_{name}": value for name, value in best.items()}


def to_json(analysis: Analysis, manifest: Manifest, pictures: dict[int, str]) -> dict[str, Any]:
    """Curves are rounded, what is undefined is null, and the confusion matrix has its cells that are not 0.

    In these [true, found, count] the number of classes stands for no object left, and for no detection.
    """
    f1 = analysis.f1
    uris = dict(zip(manifest.table["image_id"].to_pylist(), manifest.table["uri"].to_pylist(), strict=True))
    true, found = np.nonzero(analysis.confusion_KK)
    return {
        "iou": IOU,
        "background_iou": BACKGROUND_IOU,
        "images": analysis.images,
        "classes": list(manifest.classes.distinct_names),
        "objects": analysis.objects_K.tolist(),
        "precision": _rounded(analysis.precision_RK.T),
        "f1": {
            "thresholds": _rounded(THRESHOLDS_S),
            "macro": _rounded(f1.macro_S),
            "micro": _rounded(f1.micro_S),
            "classes": _rounded(f1.classes_KS),
            "best": {"macro": _best(f1.macro), "micro": _best(f1.micro), "classes": list(map(_best, f1.classes_K))},
        },
        "confusion": np.stack([true, found, analysis.confusion_KK[true, found]], axis=1).tolist(),
        "errors": {
            name: {"count": analysis.error_counts[name], "dAP50": dap} for name, dap in analysis.error_dap.items()
        },
        "worst": [
            image._asdict() | {"file_name": uris[image.image_id], "picture": pictures.get(image.image_id)}
            for image in analysis.worst
        ],
    }


def _best(best: Best) -> dict[str, float] | None:
    return None if best.f1 < 0 else best._asdict()


def _rounded(values: np.ndarray) -> list[Any]:
    """Nested lists; NaN becomes None, and so does a row of them."""
    if values.ndim == 2:
        return [None if np.isnan(row).all() else _rounded(row) for row in values]
    return [None if np.isnan(value) else value for value in values.round(DIGITS).tolist()]


def _worst_pictures(
    analysis: Analysis, manifest: Manifest, results: Results, data: DatasetConfig, patience_s: float
) -> dict[int, Picture]:
    """By image id, of the worst images that can be loaded."""
    ids = manifest.table["image_id"].to_numpy()
    worst = np.isin(ids, [image.image_id for image in analysis.worst])
    rows = np.flatnonzero(worst & manifest.table["readable"].to_numpy())
    if not len(rows):
        return {}
    data = data.model_copy(update={"image_size": PICTURE_SIZE, "resize": "longest"})
    height, width = (manifest.table[side].to_numpy()[rows] for side in ("height", "width"))
    plan = plan_evaluation(height, width, rows, data, batch_size=1, divisor=1, rank=0, world=1)
    spec = LoadSpec(data.resize, data.padding, 0, None, data.limits, True, patience_s, scaled_decode=True)
    loaded = (batch for batch in load(Shard(manifest, plan, spec)) if not batch.skipped_B)
    return {
        int(batch.image_ids_B[0]): picture_of(batch, 0, _of_image(results, batch.image_ids_B[0])) for batch in loaded
    }


def _of_image(results: Results, image_id: int) -> Detections:
    own = results.take(np.flatnonzero(results.image_of_N == image_id))
    own = own.take(np.argsort(-own.scores_N, kind="stable"))
    return Detections(int(image_id), box_ops.xywh_to_xyxy(own.boxes_N4), own.scores_N, own.labels_N.astype(np.int64))
