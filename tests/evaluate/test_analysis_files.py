"""The files of an analysis: rounded numbers, and pictures of the worst images with boxes where they belong."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ray_det.config import DatasetConfig
from ray_det.data import decode
from ray_det.data.manifest import Manifest
from ray_det.evaluate.analysis_files import PICTURE_SIZE, write_analysis
from ray_det.evaluate.coco_eval import coco_metrics
from ray_det.evaluate.results import Results
from ray_det.report.analysis_page import write_evaluation_page
from ray_det.types import Detections, UserError
from tests.evaluate.kinds import drawn
from tests.evaluate.test_coco_eval import annotated, manifest_of
from tests.evaluate.test_hotcoco_scorer import as_manifest


@pytest.fixture
def data(small_coco, tmp_path) -> tuple[Manifest, list[Detections]]:
    manifest = manifest_of(small_coco["val"], tmp_path / "cache")
    return manifest, annotated(small_coco["val"], manifest.classes)


def spoil(found: list[Detections], i: int) -> Detections:
    """Adds a false box of class 0 to image `i` in the upper left corner, and returns it."""
    own = found[i]
    boxes = np.concatenate([own.boxes_N4, np.array([[2, 2, 8, 8]], np.float32)])
    scores = np.append(own.scores_N, np.float32(1.0))
    found[i] = Detections(own.image_id, boxes, scores, np.append(own.labels_N, 0))
    return found[i]


def test_only_images_with_errors_are_drawn_with_the_boxes(data, tmp_path):
    manifest, found = data
    (tmp_path / "worst_images").mkdir()
    (tmp_path / "worst_images" / "image_777.jpg").write_bytes(b"old")
    numbers = write_analysis(tmp_path, "test", manifest, Results.of(found), DatasetConfig())
    assert numbers == dict.fromkeys(("best_f1", "best_f1_threshold", "best_f1_precision", "best_f1_recall"), 1.0)
    assert list((tmp_path / "worst_images").iterdir()) == []
    spoiled = spoil(found, 3)
    numbers = write_analysis(tmp_path, "test", manifest, Results.of(found), DatasetConfig())
    assert 0.5 < numbers["best_f1"] < 1
    content = json.loads((tmp_path / "analysis.json").read_text())
    (worst,) = content["worst"]
    assert (worst["image_id"], worst["wrong"], worst["missed"]) == (spoiled.image_id, 1, 0)
    (file,) = (tmp_path / "worst_images").iterdir()
    assert file.name == worst["picture"] == f"image_{spoiled.image_id}.jpg"
    drawn = np.asarray(Image.open(file)).astype(int)
    assert max(drawn.shape) == PICTURE_SIZE
    row = manifest.table["image_id"].to_pylist().index(spoiled.image_id)
    scale = PICTURE_SIZE / max(manifest.table["height"][row].as_py(), manifest.table["width"][row].as_py())
    middle, left = round(5 * scale), round(2 * scale)  # of the left edge of the false box
    near = drawn[middle, left - 3 : left + 4]
    orange = (near[:, 0] > 180) & (near[:, 2] < 110)
    assert orange.any()


def test_what_is_undefined_is_null_and_cells_add_up(data, tmp_path):
    manifest, found = data
    spoil(found, 0)
    none = 1
    results = Results.of(found)
    write_analysis(tmp_path, "val", manifest, results.take(np.flatnonzero(results.labels_N != none)), DatasetConfig())
    content = json.loads((tmp_path / "analysis.json").read_text())
    assert content["split"] == "val" and content["classes"] == list(manifest.classes.names)
    assert content["f1"]["best"]["classes"][none] == {"f1": 0, "threshold": 1, "precision": 0, "recall": 0}
    missed = [cell for cell in content["confusion"] if cell[1] == len(manifest.classes)]
    assert missed == [[none, len(manifest.classes), content["objects"][none]]]
    assert sum(cell[2] for cell in content["confusion"] if cell[0] < len(manifest.classes)) == sum(content["objects"])
    assert content["errors"]["missed"]["count"] == content["objects"][none]


def test_classes_of_one_name_have_rows_of_their_own(data, tmp_path):
    manifest, found = data
    first, second, _ = manifest.classes.names
    manifest = replace(manifest, classes=replace(manifest.classes, names=(first, second, first)))
    results = Results.of(found)
    write_analysis(tmp_path, "val", manifest, results, DatasetConfig())
    metrics = {f"val/{name}": value for name, value in coco_metrics(manifest, results).items()}
    (tmp_path / "summary.json").write_text(json.dumps(metrics))
    page = write_evaluation_page(tmp_path, "page").read_text()
    objects = json.loads((tmp_path / "analysis.json").read_text())["objects"]
    assert len(set(objects)) == 3
    for label in (0, 2):
        name = f"{first} (id {manifest.classes.category_ids[label]})"
        assert f"<tr><td>{name}</td><td>1.000</td><td>{objects[label]}</td>" in page


def test_an_image_that_cannot_be_decoded_has_no_picture(data, tmp_path, monkeypatch):
    manifest, found = data
    for i in (2, 4):
        spoil(found, i)
    real = decode.decode_for

    def decode_for(content: bytes, name: str, *more):
        if name == manifest.uri(2):
            raise UserError("cannot decode image")
        return real(content, name, *more)

    monkeypatch.setattr(decode, "decode_for", decode_for)
    write_analysis(tmp_path, "val", manifest, Results.of(found), DatasetConfig())
    pictures = [image["picture"] for image in json.loads((tmp_path / "analysis.json").read_text())["worst"]]
    assert len(pictures) == 2 and pictures.count(None) == 1


@pytest.mark.parametrize("kind", ["nothing_annotated", "no_detections", "images_left_out"])
def test_there_is_a_page_whatever_the_data_are_like(tmp_path, kind):
    document, found = drawn(5, [kind])
    manifest = as_manifest(document)
    numbers = write_analysis(tmp_path, "val", manifest, Results.of(found), DatasetConfig())
    assert numbers["best_f1"] == {"nothing_annotated": -1, "no_detections": 0}.get(kind, pytest.approx(0.3, abs=0.3))
    page = write_evaluation_page(tmp_path, "page").read_text()
    assert "Detections of val" in page and "Worst images" not in page  # none of the files is there
    assert ("nothing recorded" in page) == (kind == "nothing_annotated")
