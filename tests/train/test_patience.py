"""A run that ends early because val/AP has stopped growing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_det.config import TrainJobConfig
from ray_det.train.checkpoint import TrainState
from ray_det.types import UserError
from tests.train.runner import records, run_alone
from tests.train.test_equivalence import STEPS, same_checkpoint, spec

PATIENCE = 2


def asked(small_coco: dict[str, Path], storage: Path, background: bool = False) -> dict[str, Any]:
    """A run that learns nothing: its first val/AP stays the best."""
    one = spec(small_coco, storage, "fcos", epochs=6, lr=1e-12)
    one["config"]["optim"]["lr_min"] = 0
    one["config"]["train"] |= {"patience": PATIENCE, "checkpoint_every_steps": 0}
    one["config"]["eval"]["background"] = background
    return one


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_ends_properly_and_the_same_wherever_it_was_stopped(background, small_coco, tmp_path):
    """In the background, what is known of an epoch is known when the next one ends, which then is the last."""
    whole = run_alone(asked(small_coco, tmp_path / "whole", background))
    summary, epochs = json.loads((whole / "summary.json").read_text()), 1 + PATIENCE + background
    assert summary["epochs_done"] == epochs and summary["global_step"] == epochs * STEPS
    assert [r["train/epoch"] for r in records(whole) if "val/AP" in r] == list(range(epochs))
    assert summary["best_step"] == STEPS and "test/AP" in summary and (whole / "report.html").exists()
    assert "no better val/AP in 2 epochs: the run ends" in (whole / "messages.txt").read_text()
    for kept in sorted((whole / "kept").iterdir()):
        resumed = tmp_path / kept.name / "run"
        resumed.mkdir(parents=True)
        for left in ("metrics.jsonl", "run.json"):
            shutil.copy(whole / left, resumed / left)
        shutil.copytree(whole / "best", resumed / "best")
        again = run_alone(asked(small_coco, tmp_path / kept.name, background) | {"checkpoint": str(kept)})
        assert records(again) == records(whole), kept.name
        same_checkpoint(whole / "best", again / "best")
        assert json.loads((again / "summary.json").read_text())["epochs_done"] == epochs


def test_epochs_that_were_not_evaluated_do_not_try_patience():
    config = TrainJobConfig.model_validate({"train": {"epochs": 20, "patience": 3}, "eval": {"every_epochs": 4}})
    at = {epoch: TrainState(epoch=epoch, best_epoch=4, best_ap=0.5).has_next(config) for epoch in (5, 7, 8, 19)}
    assert at == {5: True, 7: True, 8: False, 19: False}
    assert not TrainState(epoch=20, best_epoch=20).has_next(config)


def test_a_val_without_objects_says_nothing_of_what_is_best(small_coco, tmp_path):
    """Its AP is -1 in every epoch: the run goes through, and keeps the last weights."""
    content = json.loads(small_coco["val"].read_text())
    (tmp_path / "val.json").write_text(json.dumps(content | {"annotations": []}))
    one = asked(small_coco, tmp_path / "runs")
    one["config"]["train"]["epochs"] = 4
    one["config"]["data"] |= {"val": str(tmp_path / "val.json"), "images": str(small_coco["val"].parent / "images")}
    run = run_alone(one)
    assert [r["val/AP"] for r in records(run) if "val/AP" in r] == [-1.0] * 4
    summary = json.loads((run / "summary.json").read_text())
    assert summary["epochs_done"] == 4 and summary["best_step"] == 4 * STEPS
    assert "no better" not in (run / "messages.txt").read_text()


def test_patience_needs_val(small_coco, tmp_path):
    one = asked(small_coco, tmp_path)
    del one["config"]["data"]["val"]
    with pytest.raises(UserError, match="needs --data.val"):
        run_alone(one)
