"""The folder of a prediction: what goes on, what is refused, and JSON made of parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_det.evaluate.detections_file import detections_table
from ray_det.evaluate.results import Results
from ray_det.predict.job import PredictJob, made_of
from ray_det.predict.output import IMAGES_SCHEMA, Output
from ray_det.predict.parquet_inputs import read_inputs
from ray_det.storage import Folder, StorageError
from ray_det.types import UserError
from tests.predict.conftest import CLASSES

MADE_OF = {"format": 1, "checkpoint": "a", "input": "b", "min_score": 0.0}


@pytest.fixture
def output(tmp_path) -> Output:
    return Output(Folder.at(str(tmp_path / "out")))


def results(image_ids: list[int]) -> Results:
    n = len(image_ids)
    boxes = (np.arange(4 * n).reshape(n, 4) / 3).astype(np.float32)
    return Results(
        np.unique(image_ids), np.array(image_ids, np.int64), boxes, np.full(n, 0.1, np.float32), np.arange(n) % 3
    )


def write(output: Output, number: int, image_ids: list[int], problems: dict[int, str]) -> Results:
    found = results(image_ids)
    names = pa.array([f"{i}.jpg" for i in image_ids], pa.string())
    every = sorted({*image_ids, *problems})
    rows = [
        {
            "image_id": i,
            "file_name": f"{i}.jpg",
            "detections": image_ids.count(i),
            "problem": problems.get(i),
        }
        for i in every
    ]
    images = pa.Table.from_pylist(rows, IMAGES_SCHEMA)
    output.write_shard(number, detections_table(found, names, CLASSES), images)
    return found


def test_the_json_is_that_of_all_results_in_order(output):
    shards = [write(output, 0, [1, 1, 2], {}), write(output, 1, [], {3: "gone"}), write(output, 2, [5, 6], {4: "x"})]
    output.write_coco(3)
    text = (Path(output.folder.uri) / "detections.json").read_text()
    assert text == json.dumps(Results.joined(shards).to_coco(CLASSES))
    totals = output.write_skipped(3)
    assert totals == (6, 2, 5, ["3.jpg: gone", "4.jpg: x"])
    lines = (Path(output.folder.uri) / "skipped_images.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"image_id": 3, "file": "3.jpg", "reason": "gone"},
        {"image_id": 4, "file": "4.jpg", "reason": "x"},
    ]


def test_nothing_found_is_an_empty_list(output):
    write(output, 0, [], {1: "gone"})
    output.write_coco(1)
    assert json.loads((Path(output.folder.uri) / "detections.json").read_text()) == []


def test_a_shard_is_done_when_its_images_are_there(output):
    output.claim(MADE_OF, overwrite=False)
    assert output.done() == set()
    write(output, 3, [1], {})
    write(output, 12, [2], {})
    folder = Path(output.folder.uri)
    (folder / "images.parquet" / "part-000003.parquet").unlink()
    (folder / "images.parquet" / ".part-000007.parquet.99.tmp").write_text("killed")
    assert output.done() == {12}
    assert [path.name for path in (folder / "images.parquet").iterdir()] == ["part-000012.parquet"]


def test_the_same_goes_on_and_anything_else_is_refused(output):
    output.claim(MADE_OF, overwrite=False)
    write(output, 0, [1], {})
    output.claim(MADE_OF, overwrite=False)
    assert output.done() == {0}
    with pytest.raises(UserError, match=r"differs in checkpoint, min_score: .* --overwrite"):
        output.claim(MADE_OF | {"checkpoint": "c", "min_score": 0.5}, overwrite=False)
    assert output.done() == {0}
    output.claim(MADE_OF | {"checkpoint": "c"}, overwrite=True)
    assert output.done() == set()
    output.claim(MADE_OF | {"checkpoint": "c"}, overwrite=False)


@pytest.mark.parametrize("packed", [False, True])
def test_another_cut_into_as_many_shards_is_refused_by_its_name(output, photos, tmp_path, packed):
    if packed:
        pq.write_table(pa.table({"bytes": [b""] * 9}), tmp_path / "set.parquet")

    def cut(shard_images: int | None) -> dict:
        inputs = read_inputs(str(tmp_path / "set.parquet" if packed else photos), None, shard_images, "/none")
        assert shard_images is None or len(inputs.shards) == 2
        return made_of(PredictJob("model", inputs, output.folder), "weights")

    output.claim(cut(5), overwrite=False)
    output.claim(cut(5), overwrite=False)
    for other in (6, None):
        with pytest.raises(UserError, match=r"differs in shard_images: .* --overwrite"):
            output.claim(cut(other), overwrite=False)


def test_other_results_are_not_overwritten(output):
    output.folder.write_text("detections.json", "[]")
    with pytest.raises(UserError, match="holds other results"):
        output.claim(MADE_OF, overwrite=False)
    output.claim(MADE_OF, overwrite=True)
    assert not output.folder.exists("detections.json")


def test_a_disk_that_refuses_is_one_line(tmp_path):
    (tmp_path / "out").write_text("a file in its place")
    with pytest.raises(StorageError, match=r"^cannot write .*/out/detections.parquet/part-000000.parquet: "):
        write(Output(Folder.at(str(tmp_path / "out"))), 0, [1], {})
