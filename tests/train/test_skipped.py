"""An image that passes the preflight and cannot be decoded: the run ends, or goes on the same at any world size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ray_det.evaluate.inference import infer
from ray_det.types import TrainingError, UserError
from tests.models.zoo import CPU, FAMILIES, build, micro_batch, spread_scores
from tests.train.runner import records, run_alone, run_world

BROKEN = {"train": "train_0004.jpg", "val": "val_0002.jpg"}
EPOCHS, BATCH = 2, 4  # 16 images: no batch is filled up


def break_picture(path: Path) -> None:
    """Put a PNG of the same size in its place, whose header and end are whole and whose pixels are not."""
    shape = np.asarray(cv2.imread(str(path))).shape
    data = bytearray(cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, shape, np.uint8))[1])
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def broken_coco(small_coco, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("broken") / "coco"
    shutil.copytree(small_coco["train"].parent, folder)
    for name in BROKEN.values():
        break_picture(folder / "images" / name)
    return {split: str(folder / path.name) for split, path in small_coco.items()}


def spec(data: dict[str, Any], storage: Path, world: int = 1) -> dict[str, Any]:
    config = {
        "name": "run",
        "storage": str(storage),
        "data": {"image_size": 96, "on_bad_image": "skip", "max_skipped_share": 0.2} | data,
        "model": FAMILIES["fcos"].model_dump(),
        "train": {"epochs": EPOCHS, "global_batch_size": BATCH, "micro_batch_size": 1, "precision": "fp32"},
        "eval": {"batch_size": 2},
        "workers": {"num": world},
        "wandb": {"mode": "disabled"},
    }
    config["train"]["checkpoint_every_steps"] = 2
    return {"config": config, "world": world, "frozen_norms": True}


def listed(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "skipped_images.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(broken_coco, tmp_path_factory) -> Path:
    return run_alone(spec(broken_coco, tmp_path_factory.mktemp("alone")))


def test_it_is_listed_once_per_epoch_and_told_once_per_file(alone):
    found = listed(alone)
    assert [(r["split"], r["file"]) for r in found] == [("train", BROKEN["train"]), ("val", BROKEN["val"])] * EPOCHS
    assert [r["image_id"] for r in found] == [4, 2] * EPOCHS
    steps = [r["global_step"] for r in found]
    assert 1 <= steps[0] <= 4 == steps[1] < steps[2] <= 8 == steps[3]
    assert all(f"image {r['image_id']}: cannot decode image" in r["reason"] for r in found)
    told = [line for line in (alone / "messages.txt").read_text().splitlines() if "blank image" in line]
    assert len(told) == 2 and BROKEN["train"] in told[0] and BROKEN["val"] in told[1]
    assert json.loads((alone / "summary.json").read_text())["skipped_images"] == EPOCHS


@pytest.mark.slow
def test_two_workers_skip_the_same_and_learn_the_same(alone, broken_coco, tmp_path):
    run = run_world(spec(broken_coco, tmp_path, world=2), tmp_path)
    assert listed(run) == listed(alone)
    steps = [(a, b) for a, b in zip(records(alone), records(run), strict=True) if "train/batch_loss" in a]
    assert len(steps) == EPOCHS * 4
    for a, b in steps:
        assert b["train/batch_loss"] == pytest.approx(a["train/batch_loss"], rel=1e-3), a["global_step"]


def test_partners_that_are_missing_are_listed_and_not_counted(broken_coco, tmp_path):
    asked = spec(broken_coco, tmp_path)
    asked["config"] |= {"augment": {"mosaic": 1, "close_mosaic": 0}}
    asked["config"]["train"] |= {"epochs": 1}
    asked["config"]["data"] |= {"max_skipped_share": 0.143}  # one of 7 in val, and one of 16, not all of its mosaics
    run = run_alone(asked)
    found = [(r["split"], r["file"], r["image_id"]) for r in listed(run)]
    assert set(found) == {("train", BROKEN["train"], 4), ("val", BROKEN["val"], 2)}
    assert len({r["global_step"] for r in listed(run) if r["split"] == "train"}) > 1, "it is once in an epoch itself"
    assert json.loads((run / "summary.json").read_text())["skipped_images"] == 1


def test_a_resumed_run_keeps_the_count_and_lists_nothing_twice(alone, broken_coco, tmp_path):
    resumed = tmp_path / "run"
    resumed.mkdir()
    for name in ("metrics.jsonl", "run.json", "skipped_images.jsonl"):
        shutil.copy(alone / name, resumed)
    with (resumed / "skipped_images.jsonl").open("a") as file:
        file.write('{"global_step": 7, "spl')  # torn by a kill
    checkpoint = sorted((alone / "kept").iterdir())[0]
    run_alone(spec(broken_coco, tmp_path) | {"checkpoint": str(checkpoint)})
    assert listed(resumed) == listed(alone) and records(resumed) == records(alone)
    assert json.loads((resumed / "summary.json").read_text())["skipped_images"] == EPOCHS
    assert "blank image" not in (resumed / "messages.txt").read_text()


def test_to_fail_names_file_id_and_reason(broken_coco, tmp_path):
    with pytest.raises(UserError, match=rf"^image 4: cannot decode image .*{BROKEN['train']}: OSError: "):
        run_alone(spec(broken_coco | {"on_bad_image": "fail"}, tmp_path))


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.06, r"^1 of 16 images of training could not be loaded, more than data.max_skipped_share 0.06; the last is "
               rf"image 4: .*{BROKEN['train']}: .*listed in .*/run/skipped_images.jsonl$"),
        (0.1, rf"^1 of 7 images of val could not be loaded.*{BROKEN['val']}"),
    ],
)  # fmt: skip
def test_too_many_end_the_run(broken_coco, tmp_path, share, message):
    with pytest.raises(TrainingError, match=message):
        run_alone(spec(broken_coco | {"max_skipped_share": share}, tmp_path))


def test_a_skipped_image_has_no_detections_and_its_neighbours_have_theirs():
    detector = spread_scores(build("fcos"))
    whole = micro_batch(3)
    skipped = type(whole)(**{**whole.__dict__, "skipped_B": ("", "broken", "")})
    (all_there,), (one_gone,) = (list(infer(detector, [batch], CPU)) for batch in (whole, skipped))
    assert [len(d.scores_N) > 0 for d in all_there.detections] == [True] * 3
    assert [len(d.scores_N) for d in one_gone.detections] == [
        len(d.scores_N) if i != 1 else 0 for i, d in enumerate(all_there.detections)
    ]
    assert [d.image_id for d in one_gone.detections] == [0, 1, 2]
    empty = one_gone.detections[1]
    assert empty.boxes_N4.shape == (0, 4) and empty.labels_N.shape == (0,)
