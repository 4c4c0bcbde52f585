"""What a run says of its best weights at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models.zoo import FAMILIES
from tests.train.runner import records, run_alone


@pytest.mark.parametrize("split, other", [("test", "val"), ("val", "test")])
def test_the_last_evaluation_is_analysed(small_coco, tmp_path: Path, split: str, other: str):
    """Of test, or of val where there is none, whose other numbers stay those of the best epoch."""
    given = ["train", "val", "test"] if split == "test" else ["train", "val"]
    config = {
        "name": "run",
        "storage": str(tmp_path),
        "data": {name: str(small_coco[name]) for name in given} | {"image_size": 96},
        "model": FAMILIES["fcos"].model_dump(),
        "train": {"epochs": 1, "global_batch_size": 8, "micro_batch_size": 8, "precision": "fp32"},
        "eval": {"batch_size": 2, "pictures": 0},
        "workers": {"num": 1},
        "wandb": {"mode": "disabled"},
    }
    run = run_alone({"config": config, "world": 1, "frozen_norms": True})
    summary, analysis = (json.loads((run / name).read_text()) for name in ("summary.json", "analysis.json"))
    assert analysis["split"] == split
    best = analysis["f1"]["best"]["macro"]
    assert summary[f"{split}/best_f1"] == best["f1"] and summary[f"{split}/best_f1_threshold"] == best["threshold"]
    assert f"{other}/best_f1" not in summary
    (epoch,) = (record for record in records(run) if "train/epoch_avg_loss" in record)
    assert summary["val/AP"] == epoch["val/AP"] and summary["val/loss"] == epoch["val/loss"]
    drawn = {image["picture"] for image in analysis["worst"]}
    assert drawn == {path.name for path in (run / "worst_images").iterdir()} and len(drawn) > 3
    page = (run / "report.html").read_text()
    assert f"Detections of {split}" in page and page.count("data:image/jpeg") == len(drawn)
