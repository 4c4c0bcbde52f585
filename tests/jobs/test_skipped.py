"""The job that evaluates, with an image that passes the preflight and cannot be decoded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from ray_det.models.build import build_detector
from ray_det.train.checkpoint import Snapshot, TrainState
from ray_det.train.job import RunFacts
from ray_det.types import ClassList
from tests.jobs.run import run_job
from tests.models.zoo import FAMILIES, spread_scores
from tests.train.test_skipped import break_picture

CLASSES = ClassList(("disc", "box", "triangle"), (1, 3, 7))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_eval_goes_on_without_it(small_coco, tmp_path, capfd):
    torch.manual_seed(0)
    detector = spread_scores(build_detector(FAMILIES["fcos"], CLASSES)[0])
    config = {"model": FAMILIES["fcos"].model_dump(), "data": {"image_size": 96}}
    Snapshot.of(detector, None, TrainState(), RunFacts(config, CLASSES, {}, "id")).write(tmp_path / "model")
    shutil.copytree(small_coco["val"].parent, tmp_path / "coco")
    names = {i["id"]: i["file_name"] for i in json.loads(small_coco["val"].read_text())["images"]}
    break_picture(tmp_path / "coco" / "images" / names[3])
    arguments = ("--checkpoint", tmp_path / "model", "--data.val", tmp_path / "coco" / "val.json", "--batch_size", 2)
    output = tmp_path / "out"
    assert run_job("eval", *arguments, "--output", output, "--on_bad_image", "skip") == 0
    path = tmp_path / "coco" / "images" / names[3]
    assert f"skipped, its boxes count as missed: image 3: cannot decode image {path}" in capfd.readouterr().out
    found = {d["image_id"] for d in json.loads((output / "detections.json").read_text())}
    assert found == set(names) - {3}
    assert [json.loads(line)["image_id"] for line in (output / "skipped_images.jsonl").read_text().splitlines()] == [3]
