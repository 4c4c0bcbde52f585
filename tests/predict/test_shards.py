"""An actor's work in this process: shards to Parquet parts."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import ray_det
from ray_det.ahead import ahead
from ray_det.predict import shards
from ray_det.predict.flow import by_canvas
from ray_det.predict.inputs import Inputs, file_inputs
from ray_det.predict.output import DETECTIONS, IMAGES, Output
from ray_det.predict.parquet_inputs import read_inputs
from ray_det.predict.predictor import open_checkpoint
from ray_det.predict.shards import ShardJob, ShardPredictor, fingerprint
from ray_det.retry import PATIENCE_S
from ray_det.storage import Folder, StorageError
from ray_det.types import UserError
from tests.far import far_away
from tests.predict.conftest import CLASSES, write_checkpoint
from tests.predict.test_inputs import names
from tests.s3 import nowhere


@pytest.fixture(autouse=True)
def as_before():
    """An actor's process is its own, this one is not."""
    yield
    torch.use_deterministic_algorithms(False)


def inputs_of(photos: Path, size: int | None = None) -> Inputs:
    return read_inputs(str(photos), None, size, "/none")


@pytest.fixture
def job(checkpoint, photos, tmp_path) -> ShardJob:
    output, weights = Output(Folder.at(str(tmp_path / "out"))), fingerprint(open_checkpoint(str(checkpoint)))
    read = inputs_of(photos).read
    return ShardJob(str(checkpoint), weights, read, output, 2, 1 << 20, 0.0, True, frozenset({(0, 1)}), False, 1, 120.0)


def run(job: ShardJob, inputs: Inputs) -> list[dict]:
    """Rows of the detections."""
    predictor = ShardPredictor(job)
    for shard in inputs.shards:
        told = [table["images"][0].as_py() for table in predictor(shard)]
        assert sum(told) == len(shard)
    return [row for part in parts(job, "detections") for row in part]


def parts(job: ShardJob, kind: str) -> list[list[dict]]:
    folder = job.output.folder.local
    assert folder
    return [pq.read_table(path).to_pylist() for path in sorted((folder / f"{kind}.parquet").glob("part-*"))]


@pytest.mark.parametrize(("scaled", "ways"), [(False, ((4, None), (3, 2))), (True, ((4, None),))])
def test_every_image_has_what_it_has_alone(job, photos, tmp_path, scaled, ways):
    """Whatever shares its batch, at any batch size and cut."""
    model = write_checkpoint(tmp_path / "model", scaled_decode=scaled)
    job = replace(job, checkpoint=str(model), weights=fingerprint(open_checkpoint(str(model))))
    detector, listed = ray_det.load(str(model), device="cpu"), names(photos)
    readable = [(i, name) for i, name in enumerate(listed, 1) if name not in ("cut.jpg", "text.png")]
    assert len(readable) == 7
    alone = {i: detector.predict([photos / name])[0] for i, name in readable}
    for batch_size, size in ways:
        rows = run(replace(job, batch_size=batch_size), inputs_of(photos, size))
        ids = [row["image_id"] for row in rows]
        assert ids == sorted(ids) and set(ids) == alone.keys()
        for i, name in readable:
            found, mine = alone[i], [row for row in rows if row["image_id"] == i]
            x, y, w, h = np.array([row["bbox"] for row in mine]).T
            assert np.allclose(np.stack([x, y, x + w, y + h], 1), found.boxes_N4, atol=1e-4)
            assert np.allclose([row["score"] for row in mine], found.scores_N, atol=1e-4)
            assert [row["class"] for row in mine] == [CLASSES.names[label] for label in found.labels_N]
            assert [row["category_id"] for row in mine] == [CLASSES.category_ids[label] for label in found.labels_N]
            assert {row["file_name"] for row in mine} == {name}


def test_every_image_has_a_row_also_where_it_cannot_be_read(job, photos):
    rows = run(job, inputs_of(photos, 4))
    (first, second, third) = parts(job, "images")
    images = first + second + third
    assert [len(first), len(second)] == [4, 4]
    assert [(row["image_id"], row["file_name"]) for row in images] == list(enumerate(names(photos), 1))
    problems = {row["file_name"]: row["problem"] for row in images if row["problem"]}
    assert problems.keys() == {"cut.jpg", "text.png"} and problems["text.png"].startswith("not an image")
    for row in images:
        counted = sum(one["image_id"] == row["image_id"] for one in rows)
        assert row["detections"] == counted and (row["problem"] is None) == (counted > 0)
        if row["problem"] is None:
            assert (row["width"], row["height"]) == Image.open(photos / row["file_name"]).size


def test_an_image_that_cannot_be_read_ends_it_if_asked(job, photos):
    with pytest.raises(UserError, match=r"^image 1 cannot be read: cut.jpg: "):
        run(replace(job, skip_bad=False), inputs_of(photos))
    assert parts(job, "images") == []


def test_scores_below_the_lowest_are_not_written(job, photos):
    every = run(job, inputs_of(photos))
    least = float(np.median([row["score"] for row in every]))
    assert run(replace(job, min_score=least), inputs_of(photos)) == [row for row in every if row["score"] >= least]


def test_pictures_are_drawn(job, photos):
    run(job, inputs_of(photos))
    folder = job.output.folder.local
    assert folder is not None
    (path,) = (folder / "pictures").iterdir()
    assert path.name == "2.jpg" and names(photos)[1].startswith("deep/")
    assert max(Image.open(path).size) == 480


def test_another_checkpoint_in_its_place_is_noticed(job, photos):
    with pytest.raises(UserError, match="has changed since"):
        run(replace(job, weights="other"), inputs_of(photos))


def test_the_detector_is_loaded_once(job, photos, monkeypatch):
    opened, open_it = [], open_checkpoint
    monkeypatch.setattr(shards, "open_checkpoint", lambda *given: opened.append(given) or open_it(*given))
    run(job, inputs_of(photos, 1))
    assert len(opened) == 1 and len(parts(job, "images")) == 9


class Canvas:
    """As much of a batch as `by_canvas` looks at."""

    def __init__(self, canvas: int) -> None:
        self.canvas, self.pixels_BHW3 = canvas, np.empty((1, canvas, canvas, 3), np.uint8)


def test_groups_are_of_one_canvas_full_where_they_can_be_and_few_images_wait():
    images = [Canvas(side) for side in np.random.default_rng(0).choice([1, 2, 3, 4, 5], 60, p=[0.6, *[0.1] * 4])]
    taken: list = []
    groups = list(by_canvas(iter(images), 4, 8))  # pyright: ignore[reportArgumentType]
    for group in groups:
        assert len({image.canvas for image in group}) == 1 and 1 <= len(group) <= 4  # pyright: ignore
        taken += group
    assert sorted(map(id, taken)) == sorted(map(id, images))
    assert sum(len(group) == 4 for group in groups) >= 7
    few = list(by_canvas((Canvas(side) for side in range(1, 20)), 4, 8))  # pyright: ignore[reportArgumentType]
    assert [len(group) for group in few] == [1] * 19


def test_only_so_many_are_read_ahead():
    from concurrent.futures import ThreadPoolExecutor

    asked: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        results = ahead(pool, lambda i: i * i, (asked.append(i) or i for i in range(100)), 5)
        assert next(results) == 0 and len(asked) == 5
        assert [next(results), *results] == [i * i for i in range(1, 100)]


@pytest.mark.usefixtures("s3")
def test_from_an_object_store_to_an_object_store(job, photos):
    """The same parts, JSON and list as on a disk."""
    run(job, inputs_of(photos, 4))
    here, there = job.output, Output(Folder.at("s3://bucket/predicted"))
    Folder.at("s3://bucket/photos").upload(photos)
    for source in ("s3://bucket/photos", "s3://bucket/photos/**/*.*g"):
        inputs = read_inputs(source, None, 4, there.folder.uri)
        there.claim({"input": inputs.digest}, overwrite=True)
        assert there.done() == set()
        predictor = ShardPredictor(replace(job, read=inputs.read, output=there))
        for number, shard in enumerate(inputs.shards):
            assert len(list(predictor(shard))) > 1 and there.done() == set(range(number + 1))
        there.claim({"input": inputs.digest}, overwrite=False)
        for kind in (DETECTIONS, IMAGES):
            assert pa.concat_tables(there.tables(kind, 3)) == pa.concat_tables(here.tables(kind, 3))
        for output in (here, there):
            output.write_coco(3)
            assert output.write_skipped(3).unreadable == 2
        assert there.folder.read_text("detections.json") == here.folder.read_text("detections.json")
        assert (there.folder / "pictures").names() == ["2.jpg"]


@pytest.mark.usefixtures("s3")
def test_a_remote_checkpoint_is_on_the_disk_as_long_as_it_is_held(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    remote = Folder.at("s3://bucket/held")
    remote.upload(checkpoint)
    opened = open_checkpoint(remote.uri)
    assert opened.folder.parent == tmp_path and opened.build(torch.device("cpu"))
    del opened
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    (remote / "model.safetensors").delete()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        open_checkpoint(remote.uri)
    assert list(tmp_path.iterdir()) == []
    assert checkpoint.exists() and open_checkpoint(str(checkpoint)).folder == checkpoint
    gc.collect()
    assert (checkpoint / "state.json").exists()


def test_many_files_of_an_object_store_are_read_at_once(job, small_coco, s3, monkeypatch):
    Folder.at("s3://bucket/far_photos").upload(small_coco["train"].parent / "images")
    inputs = read_inputs("s3://bucket/far_photos", None, None, "/none")
    with far_away(s3, monkeypatch, 0.1) as storage:
        run(replace(job, read=inputs.read), inputs)
    assert storage.most_at_once >= 8


@pytest.mark.slow
def test_a_storage_out_of_reach_is_waited_for_as_long_as_asked(job, monkeypatch):
    for name, value in nowhere().items():
        monkeypatch.setenv(name, value)
    inputs = file_inputs(pa.table({"image_id": [1], "uri": ["a.jpg"]}), "s3://away/photos", None, None, None, "")
    output, began = Output(Folder.at("s3://away/out", 0.5)), time.monotonic()
    with pytest.raises(StorageError, match="^cannot read s3://away/photos/a.jpg: "):
        run(replace(job, read=inputs.read, patience_s=0.5), inputs)
    with pytest.raises(StorageError, match="^cannot write s3://away/out/pictures/1.jpg: "):
        output.write_picture(1, b"jpeg")
    with pytest.raises(StorageError, match="^cannot read s3://away/out/images.parquet/part-000000.parquet: "):
        list(output.tables(IMAGES, 1))
    with pytest.raises(StorageError, match="^cannot reach s3://away/model: "):
        open_checkpoint("s3://away/model", 0.5)
    assert time.monotonic() - began < PATIENCE_S, "the default was waited for"


def test_an_unknown_precision_is_refused(checkpoint):
    with pytest.raises(UserError, match="precision 'fp16': expected auto, fp32 or bf16"):
        ray_det.load(str(checkpoint), device="cpu", precision="fp16")  # pyright: ignore[reportArgumentType]
