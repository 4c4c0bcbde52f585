"""hotcoco's numbers are those of plain pycocotools on the JSON itself, to the last bit, whatever data sets are like."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ray_det.data import coco
from ray_det.data.headers import Header
from ray_det.data.manifest import Manifest, build
from ray_det.data.preflight import inspect
from ray_det.data.prepare import prepare
from ray_det.data.truth import annotations_of
from ray_det.evaluate import hotcoco_scorer, pycocotools_scorer
from ray_det.evaluate.coco_eval import coco_metrics
from ray_det.evaluate.pycocotools_scorer import Curves
from ray_det.evaluate.results import Results
from ray_det.types import Detections
from tests.evaluate.kinds import KINDS, SIDE, Document, drawn
from tests.evaluate.test_coco_eval import noisy


def as_manifest(document: Document) -> Manifest:
    def map_chunks(_: Any, chunks: list) -> list[list[Header]]:
        return [[Header("ok", SIDE, SIDE) for _ in names] for _, names in chunks]

    return build(inspect(coco.parse(json.dumps(document).encode(), "x.json"), "/data", map_chunks)[0], "/data")


def hotcoco(manifest: Manifest, results: Results) -> Curves:
    image_ids = manifest.table["image_id"].to_numpy()
    return hotcoco_scorer.curves(annotations_of(manifest), results, image_ids, len(manifest.classes))


def plain_pycocotools(document: Document, results: list[dict[str, Any]]) -> Curves:
    truth: Any = COCO()  # its type stubs know files only
    nothing: Any = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset, nothing.dataset = copy.deepcopy(document), copy.deepcopy(document | {"annotations": []})
        truth.createIndex()
        nothing.createIndex()
        evaluation: Any = COCOeval(truth, truth.loadRes(results) if results else nothing, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return Curves(evaluation.eval["precision"], evaluation.eval["recall"])


def assert_same(document: Document, manifest: Manifest, detections: list[Detections]) -> dict[str, float]:
    """All that the twelve numbers are made of, and the numbers; these are returned."""
    results = Results.of(detections)
    theirs = plain_pycocotools(document, results.to_coco(manifest.classes))
    for a, b in zip(hotcoco(manifest, results), theirs, strict=True):
        assert a.shape == b.shape and a.tobytes() == b.tobytes()
    numbers = coco_metrics(manifest, results, "hotcoco")
    assert numbers == coco_metrics(manifest, results, "pycocotools")
    return numbers


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_each_kind_of_data(kind: str | None) -> None:
    found = []
    for seed in range(8):
        document, detections = drawn(seed, [kind] if kind else [])
        found.append(assert_same(document, as_manifest(document), detections)["AP50"])
    assert max(found) > 0.1 or kind in ("no_detections", "nothing_annotated"), "nothing to compare"


@settings(max_examples=40, deadline=None)
@example(520109422, ["boxes_that_are_no_numbers", "detections_that_are_no_numbers", "empty_boxes"])  # inf beside inf
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(sorted(KINDS)), min_size=2, max_size=6, unique=True))
def test_kinds_together(seed: int, kinds: list[str]) -> None:
    document, detections = drawn(seed, kinds)
    assert_same(document, as_manifest(document), detections)


@pytest.mark.parametrize("split", ["coco_cc/train", "coco_cc/val", "coco_cc/test", "bccd/val"])
def test_photographs(real_data: Path, tmp_path: Path, split: str) -> None:
    source = real_data / f"{split}.json"
    manifest, _ = prepare(str(source), None, tmp_path)
    assert_same(json.loads(source.read_text()), manifest, noisy(manifest, seed=1))


@pytest.mark.parametrize(("kind", "some"), [("crowds", 0), ("id_zero", 1), ("detections_that_are_no_numbers", 1)])
def test_pycocotools_gets_only_the_classes_that_need_it(kind: str, some: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[int]] = []

    def spy(ground_truth: Document, results: list[dict[str, Any]]) -> Curves:
        asked.append({a["category_id"] for a in ground_truth["annotations"]} | {r["category_id"] for r in results})
        return there(ground_truth, results)

    there = pycocotools_scorer.curves
    monkeypatch.setattr(pycocotools_scorer, "curves", spy)
    document, detections = drawn(1, [kind])
    hotcoco(as_manifest(document), Results.of(detections))
    assert bool(asked) == some and all(len(labels) == 1 for labels in asked)


def test_results_of_an_unknown_image_are_an_error() -> None:
    document, detections = drawn(0, [])
    strange = Detections(5, detections[0].boxes_N4, detections[0].scores_N, detections[0].labels_N)
    with pytest.raises(ValueError, match=r"that the data set has not: \[5\]"):
        hotcoco(as_manifest(document), Results.of([*detections, strange]))


def test_the_order_of_the_images_is_no_matter() -> None:
    document, detections = drawn(0, ["equal_scores"])
    manifest = as_manifest(document)
    here, there = (hotcoco(manifest, Results.of(found)) for found in (detections, detections[::-1]))
    assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))
