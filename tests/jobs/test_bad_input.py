"""What a user gets wrong: one clear line and exit status 2."""

from __future__ import annotations

import json

import pytest

from tests.jobs.run import run_job


@pytest.fixture
def refused(capfd):
    """Run a job that must be refused; -> its one line."""

    def run(name: str, *arguments: object) -> str:
        status = run_job(name, *arguments)
        error = capfd.readouterr().err.strip()
        assert status == 2, error
        assert len(error.splitlines()) == 1 and error.startswith("error: "), error
        return error

    return run


def test_missing_file(refused, tmp_path):
    assert "no such file" in (line := refused("train", "--data.train", tmp_path / "no.json", "--storage", tmp_path))
    assert "no.json" in line


def test_unknown_option(refused):
    assert "--optim.lr?" in refused("train", "--optim.lrr", "1")


def test_wrong_type(refused):
    line = refused("train", "--train.epochs", "many")
    assert "train.epochs" in line and "many" in line


def test_batch_that_does_not_divide(refused):
    assert "4 is not divisible by workers.num 3" in refused("train", "--workers.num", "3")


def test_empty_dataset(refused, tmp_path):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    assert "empty dataset" in refused("train", "--data.train", path, "--storage", tmp_path)


def test_categories_that_differ(refused, small_coco, tmp_path):
    content = json.loads(small_coco["val"].read_text())
    content["categories"][0]["name"] = "ring"
    other = tmp_path / "val.json"
    other.write_text(json.dumps(content))
    images = small_coco["val"].parent / "images"
    data = ("--data.train", small_coco["train"], "--data.val", other, "--data.images", images)
    assert "disc / ring" in refused("train", *data, "--storage", tmp_path)


def test_no_checkpoint(refused, small_coco, tmp_path):
    arguments = ("--data.val", small_coco["val"], "--output", tmp_path / "out")
    assert "no such checkpoint" in refused("eval", "--checkpoint", tmp_path / "nothing", *arguments)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "state.json").write_text('{"format": 1}')
    line = refused("predict", "--checkpoint", tmp_path / "half", "--input", tmp_path, "--output", tmp_path / "out")
    assert "broken checkpoint" in line and "state.json" in line


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_room(refused, small_coco, tmp_path):
    sizes = ("--workers.num", 64, "--train.global_batch_size", 64)
    line = refused("train", "--data.train", small_coco["train"], "--storage", tmp_path, *sizes)
    assert "no room for 64 workers" in line
