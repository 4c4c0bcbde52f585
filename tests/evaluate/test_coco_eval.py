"""COCO's metrics are those of plain pycocotools on the original files, to the last bit."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ray_det import boxes as box_ops
from ray_det.config import Scorer
from ray_det.data.manifest import Manifest
from ray_det.data.prepare import prepare
from ray_det.evaluate.coco_eval import NAMES, coco_metrics
from ray_det.evaluate.results import Results
from ray_det.types import ClassList, Detections

SCORERS = pytest.mark.parametrize("scorer", get_args(Scorer))


@pytest.fixture(scope="module")
def small(small_coco, tmp_path_factory) -> tuple[Path, Manifest]:
    return small_coco["val"], manifest_of(small_coco["val"], tmp_path_factory.mktemp("cache"))


def manifest_of(source: Path, cache: Path) -> Manifest:
    return prepare(str(source), None, cache)[0]


def noisy(manifest: Manifest, seed: int = 0) -> list[Detections]:
    """Shifted, renamed, doubled and left out objects, and some that are not there, best score first."""
    rng = np.random.default_rng(seed)
    found: list[Detections] = []
    for image in manifest.table.to_pylist():
        limits = np.array([image["width"], image["height"]] * 2)
        true = np.array(image["boxes"], np.float64).reshape(-1, 4)
        twice = np.repeat(np.arange(len(true)), rng.integers(0, 3, len(true)))
        sides = np.tile(true[twice, 2:], 2)
        near = box_ops.xywh_to_xyxy(true[twice]) + rng.normal(0, 0.06, (len(twice), 4)) * sides
        corners = rng.random((6, 2, 2))
        false = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1) * limits
        labels = np.concatenate(
            [np.array(image["labels"], np.int64)[twice], rng.integers(len(manifest.classes), size=6)]
        )
        renamed = rng.random(len(labels)) < 0.1
        labels[renamed] = rng.integers(len(manifest.classes), size=renamed.sum())
        scores = np.sort(rng.random(len(labels)).astype(np.float32).round(2))[::-1]  # with ties
        order = rng.permutation(len(labels))
        boxes = box_ops.clip(np.concatenate([near, false]), image["height"], image["width"])
        found.append(Detections(image["image_id"], boxes[order].astype(np.float32), scores, labels[order]))
    return found


def annotated(source: Path, classes: ClassList) -> list[Detections]:
    """The JSON's own objects as detections, crowds left out."""
    data = json.loads(source.read_text())
    found: list[Detections] = []
    for image in data["images"]:
        own = [a for a in data["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        boxes = box_ops.xywh_to_xyxy(np.array([a["bbox"] for a in own], np.float32).reshape(-1, 4))
        labels = np.array([classes.category_ids.index(a["category_id"]) for a in own], np.int64)
        found.append(Detections(image["id"], boxes, np.ones(len(own), np.float32), labels))
    return found


def plain_pycocotools(
    source: Path, results: list[dict[str, Any]], folder: Path
) -> tuple[list[float], dict[int, float]]:
    """The twelve numbers, and AP by category id from an evaluation of that category alone."""
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(source))
        found = truth.loadRes(str(path))

        def stats(only: list[int] | None = None) -> list[float]:
            evaluation = COCOeval(truth, found, "bbox")
            if only:
                evaluation.params.catIds = only
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            return [float(value) for value in evaluation.stats]

        return stats(), {i: stats([i])[0] for i in truth.getCatIds()}


def compare(source: Path, manifest: Manifest, folder: Path, scorer: Scorer) -> dict[str, float]:
    """Ours against theirs on noisy detections -> ours."""
    results = Results.of(noisy(manifest))
    ours = coco_metrics(manifest, results, scorer)
    twelve, by_category = plain_pycocotools(source, results.to_coco(manifest.classes), folder)
    assert [ours[name] for name in NAMES] == twelve
    names = {c["id"]: c["name"] for c in json.loads(source.read_text())["categories"]}
    assert {k: v for k, v in ours.items() if k not in NAMES} == {f"AP/{names[i]}": ap for i, ap in by_category.items()}
    assert 0.05 < ours["AP"] < 0.95, "noise that tells nothing"
    return ours


@SCORERS
def test_equals_pycocotools_on_the_files(small, tmp_path, scorer):
    source, manifest = small
    ours = compare(source, manifest, tmp_path, scorer)
    assert len({ours[f"AP/{name}"] for name in manifest.classes.names}) == 3


@SCORERS
def test_equals_pycocotools_with_crowds_and_gaps_in_ids(real_data, tmp_path, scorer):
    source = real_data / "coco_cc" / "val.json"
    manifest = manifest_of(source, tmp_path)
    assert any(sum(crowds) for crowds in manifest.table["iscrowd"].to_pylist())
    assert max(manifest.classes.category_ids) > len(manifest.classes)
    ours = compare(source, manifest, tmp_path, scorer)
    assert sum(value == -1 for name, value in ours.items() if name.startswith("AP/")) == 80 - 48


@SCORERS
def test_equals_pycocotools_with_a_degenerate_box(real_data, tmp_path, scorer):
    source = real_data / "bccd" / "val.json"
    compare(source, manifest_of(source, tmp_path), tmp_path, scorer)


def test_the_truth_itself_is_perfect(small):
    source, manifest = small
    metrics = coco_metrics(manifest, Results.of(annotated(source, manifest.classes)))
    assert metrics["AP"] == pytest.approx(1.0, abs=1e-9)
    assert [metrics[f"AP/{name}"] for name in manifest.classes.names] == pytest.approx([1.0] * 3, abs=1e-9)


@pytest.mark.parametrize("name, expected", [("coco_cc/val", 1.0), ("coco_cc/test", 1.0), ("bccd/val", 0.9966)])
def test_real_truth_itself_is_perfect_but_for_empty_boxes(real_data, tmp_path, name, expected):
    source = real_data / f"{name}.json"
    manifest = manifest_of(source, tmp_path)
    results = Results.of(annotated(source, manifest.classes))
    assert round(coco_metrics(manifest, results)["AP"], 4) == expected


def test_results_are_in_coco_s_format():
    classes = ClassList(("a", "b", "c"), (1, 3, 7))
    boxes = np.array([[1, 2, 4, 8], [0, 0, 5, 5]], np.float32)
    found = [
        Detections(12, boxes, np.array([0.75, 0.5], np.float32), np.array([2, 0])),
        Detections(13, boxes[:0], np.empty(0, np.float32), np.empty(0, np.int64)),
    ]
    assert Results.of(found).to_coco(classes) == [
        {"image_id": 12, "category_id": 7, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.75},
        {"image_id": 12, "category_id": 1, "bbox": [0.0, 0.0, 5.0, 5.0], "score": 0.5},
    ]


@SCORERS
def test_no_detections_are_zeros(small, scorer):
    _, manifest = small
    metrics = coco_metrics(manifest, Results.of([]), scorer)
    sized = {"AP_small", "AR_small", "AP_medium", "AR_medium", "AP_large", "AR_large"}
    assert {name: value for name, value in metrics.items() if name not in sized and value} == {}
    assert len(metrics) == 12 + 3 and {metrics[name] for name in sized} <= {0.0, -1.0}


@SCORERS
def test_classes_of_one_name_keep_their_own_numbers(small, scorer):
    _, manifest = small
    results = Results.of(noisy(manifest))
    before = coco_metrics(manifest, results, scorer)
    first, second, third = manifest.classes.names
    twins = replace(manifest.classes, names=(first, second, first))
    after = coco_metrics(replace(manifest, classes=twins), results, scorer)
    ids = manifest.classes.category_ids
    assert after.pop(f"AP/{first} (id {ids[0]})") == before.pop(f"AP/{first}")
    assert after.pop(f"AP/{first} (id {ids[2]})") == before.pop(f"AP/{third}")
    assert after == before


@SCORERS
def test_a_class_without_objects_is_minus_one_and_no_part_of_the_mean(small, scorer):
    _, manifest = small
    results = Results.of(noisy(manifest))
    before = coco_metrics(manifest, results, scorer)
    more = ClassList.from_json([*manifest.classes.to_json(), {"id": 100, "name": "absent"}])
    metrics = coco_metrics(replace(manifest, classes=more), results, scorer)
    assert metrics.pop("AP/absent") == -1.0
    assert metrics == before
