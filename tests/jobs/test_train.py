"""The jobs as a user runs them, on one Ray: train with two workers, go on, evaluate, predict."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import ray_det
from ray_det.report.wandb_log import read_history
from tests.jobs.run import run_job

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
STEPS, LR, LR_MIN = 4, 5e-4, 1e-6  # 16 images in global batches of 4


def train(small_coco: dict[str, Path], storage: Path, *more: object, epochs: int = 2) -> int:
    data = [word for split, path in small_coco.items() for word in (f"--data.{split}", path)]
    model = ["--model.name", "torchvision/fcos_shufflenet_v2_x0_5_fpn", "--model.weights", "none"]
    return run_job(
        "train",
        *("--name", "cells", "--storage", storage, "--train.epochs", epochs, "--optim.lr", LR),
        *("--model.fpn_channels", 64, "--data.image_size", 96, "--train.global_batch_size", 4),
        *("--workers.num", 2, "--workers.threads", 1, "--wandb.mode", "offline"),
        *data,
        *model,
        *more,
    )


@pytest.fixture(scope="module")
def run(small_coco, ray_cluster, tmp_path_factory) -> Path:
    storage = tmp_path_factory.mktemp("runs")
    assert train(small_coco, storage) == 0
    return storage / "cells"


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder_holds_what_the_readme_says(run):
    summary = json.loads((run / "summary.json").read_text())
    assert {"val/AP", "val/AP50", "test/AP", "best_step", "global_step", "images_per_s", "wall_s"} <= summary.keys()
    assert {"data_wait_share", "padded_share", "time_to_first_step_s"} <= summary.keys()
    assert summary["global_step"] == 2 * STEPS and summary["images_per_s"] > 0
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report.html", "best", "wandb", "pictures"} <= names
    assert {"test/best_f1", "test/best_f1_threshold"} <= summary.keys() and "analysis.json" in names
    assert "<svg" in (run / "report.html").read_text() and "staging" not in names


def test_every_step_once_with_the_formulas_learning_rate(run):
    """In metrics.jsonl and in wandb's own offline file."""
    steps = [r for r in lines(run) if "train/batch_loss" in r]
    assert [r["global_step"] for r in steps] == list(range(1, 2 * STEPS + 1))
    for record in steps:
        epoch = record["train/epoch"]
        assert epoch == (record["global_step"] - 1) // STEPS
        rate = LR_MIN + (LR - LR_MIN) * (1 + math.cos(math.pi * epoch / 2)) / 2
        assert record["train/learning_rate"] == pytest.approx(rate, abs=1e-9)
    epochs = [r for r in lines(run) if "train/epoch_avg_loss" in r]
    assert [r["global_step"] for r in epochs] == [STEPS, 2 * STEPS]
    assert epochs[-1]["learning_rate"] == pytest.approx(LR_MIN, abs=1e-12)
    assert all({"val/loss", "val/AP", "val/AP50"} <= r.keys() for r in epochs)
    mean = np.mean([r["train/batch_loss"] for r in steps[STEPS:]])
    assert epochs[-1]["train/epoch_avg_loss"] == pytest.approx(mean)

    sent = [row for file in sorted((run / "wandb").glob("*run-*/*.wandb")) for row in read_history(file)]
    logged = [(row["_step"], row["train/batch_loss"]) for row in sent if "train/batch_loss" in row]
    assert logged == [(r["global_step"], r["train/batch_loss"]) for r in steps]


def test_eval_predict_pycocotools_and_python_agree(run, small_coco, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    assert run_job("eval", "--checkpoint", run, "--data.val", small_coco["test"], "--output", tmp_path / "e") == 0
    evaluated = json.loads((tmp_path / "e" / "summary.json").read_text())
    for name, value in evaluated.items():
        assert value == pytest.approx(summary[name.replace("val/", "test/")], abs=1e-6), name
    assert {"val/AP", "val/AP50", "val/best_f1", "val/best_f1_threshold"} <= evaluated.keys()
    here, there = (json.loads((folder / "analysis.json").read_text()) for folder in (tmp_path / "e", run))
    assert here["confusion"] == there["confusion"] and here["split"] == "val" != there["split"]
    assert "Worst images" in (tmp_path / "e" / "report.html").read_text()

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    truth = COCO(str(small_coco["test"]))
    for image in truth.dataset["images"]:
        shutil.copy(small_coco["test"].parent / "images" / image["file_name"], pictures)
    more = ("--ids_from", small_coco["test"], "--output", tmp_path / "p", "--batch_size", 1)
    assert run_job("predict", "--checkpoint", run, "--input", pictures, *more) == 0
    found = truth.loadRes(str(tmp_path / "p" / "detections.json"))
    scored = COCOeval(truth, found, "bbox")
    for part in (scored.evaluate, scored.accumulate, scored.summarize):
        part()
    assert scored.stats[0] == pytest.approx(evaluated["val/AP"], abs=1e-4)

    detector = ray_det.load(str(run), device="cpu")
    for image in truth.dataset["images"]:
        here = detector.predict([pictures / image["file_name"]])[0]
        there: Any = found.loadAnns(found.getAnnIds(image["id"]))
        assert len(there) == len(here.scores_N)
        assert np.allclose([d["score"] for d in there], here.scores_N, atol=1e-4)


def test_eval_uses_the_classes_of_training(run, small_coco, tmp_path, capfd):
    """Another data set's names fit by the checkpoint's own renaming, or by one given to eval.

    Where the classes fit, what is refused is the number of workers.
    """
    document = json.loads(small_coco["val"].read_text())
    document["categories"][0]["name"] = "circle"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    shutil.copytree(run / "best", tmp_path / "renaming")
    state = json.loads((tmp_path / "renaming" / "state.json").read_text())
    state["config"]["data"] |= {"classes": ["triangle", "disc", "box"], "rename": {"circle": "disc"}}
    (tmp_path / "renaming" / "state.json").write_text(json.dumps(state))

    def refused(checkpoint: Path, *more: str) -> str:
        data = ("--data.val", other, "--data.images", small_coco["val"].parent / "images")
        more = ("--output", str(tmp_path / "e"), "--workers.num", "64", *more)
        assert run_job("eval", "--checkpoint", checkpoint, *data, *more) == 2
        return capfd.readouterr().err

    assert "id 1: disc / circle" in refused(run)
    assert "no room for 64 workers" in refused(run, "--data.rename", '{"circle": "disc"}')
    assert "no room for 64 workers" in refused(tmp_path / "renaming")
    assert "has no class 'disc'" in refused(tmp_path / "renaming", "--data.rename", "{}")


def test_a_finished_run_says_so_and_a_changed_one_is_refused(run, small_coco, capfd):
    assert train(small_coco, run.parent) == 0
    assert "is finished" in capfd.readouterr().out
    assert train(small_coco, run.parent, "--optim.weight_decay", "0.5") == 2
    error = capfd.readouterr().err.strip()
    assert "optim.weight_decay: 0.0001 -> 0.5" in error and len(error.splitlines()) == 1


def test_more_epochs_go_on_from_the_checkpoint_with_another_number_of_workers(run, small_coco):
    before = lines(run)
    assert train(small_coco, run.parent, "--workers.num", 1, epochs=3) == 0
    after = lines(run)
    kept = len([r for r in before if not any(k.startswith("test/") for k in r)])
    assert after[:kept] == before[:kept]
    steps = [r["global_step"] for r in after if "train/batch_loss" in r]
    assert steps == list(range(1, 3 * STEPS + 1))


def test_a_broken_checkpoint_is_named(run, small_coco, tmp_path, capfd):
    shutil.copytree(run / "best", tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    arguments = ("--data.val", small_coco["val"], "--output", tmp_path / "e")
    assert run_job("eval", "--checkpoint", tmp_path / "broken", *arguments) == 2
    error = capfd.readouterr().err.strip()
    assert "broken checkpoint" in error and "model.safetensors" in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_an_image_that_is_gone_in_training_is_named_and_not_tried_again(small_coco, tmp_path, capfd):
    folder = tmp_path / "coco"
    shutil.copytree(small_coco["train"].parent, folder)
    prepared = tmp_path / "prepared"
    assert run_job("prepare", "--source", folder / small_coco["train"].name, "--output", prepared) == 0
    gone = sorted((folder / "images").glob("train_*.jpg"))[3]
    gone.unlink()
    capfd.readouterr()
    status = train({"train": prepared / "manifest.parquet"}, tmp_path / "runs", "--workers.num", 1)
    error = capfd.readouterr().err.strip()
    assert status == 2 and gone.name in error and len(error.splitlines()) == 1
