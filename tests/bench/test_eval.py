"""The scoring benchmark asserts that all numbers are equal, and its objects are like COCO's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ray_det.bench import eval as bench
from ray_det.bench.measure import Figure
from ray_det.types import UserError


def figures(**options) -> list[Figure]:
    return list(bench.run(bench.Config(images=20, detections=20, classes=5, repeats=1, **options)))


def test_a_figure_of_the_scoring_and_one_for_each_number_of_ranks() -> None:
    scoring, one, three = figures(ranks=(1, 3))
    assert (scoring.unit, scoring.target, scoring.more["images"]) == ("images/s", ">= 10x", 20)
    assert 0.2 < scoring.more["AP50"] < 0.95, "boxes that tell nothing"
    assert "1 rank" in one.figure and "3 ranks" in three.figure
    assert one.more["bytes"] >= 20 * 20 * (4 + 1) * 4


def test_numbers_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    there = bench.coco_metrics

    def off(*arguments) -> dict[str, float]:
        return there(*arguments) | {"AP": 0.123}

    monkeypatch.setattr(bench, "coco_metrics", off)
    with pytest.raises(AssertionError, match="the numbers differ"):
        figures(ranks=())


def test_a_json_of_one_s_own(real_data: Path) -> None:
    scoring = figures(data=str(real_data / "coco_cc" / "val.json"), ranks=())[0]
    assert (scoring.more["images"], scoring.more["objects"]) == (33, 278)


def coco_file(folder: Path, **changes: Any) -> Path:
    """An image with a box that has what COCO's detection format asks for, and no more; `changes` of its annotation."""
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20]}
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [annotation, annotation | {"id": 2} | changes],
    }
    file = folder / "own.json"
    file.write_text(json.dumps(document))
    return file


def test_annotations_without_crowds_and_areas(tmp_path: Path) -> None:
    scoring = figures(data=str(coco_file(tmp_path)), ranks=())[0]
    assert scoring.more["objects"] == 2 and scoring.more["AP50"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 9}, "annotation of an image that is not listed"),
        ({"category_id": 9}, "annotation of a category that is not listed"),
        ({"id": 1}, "annotation id used again"),
        ({"bbox": 5}, "bbox"),
    ],
)
def test_what_cannot_be_scored_is_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = coco_file(tmp_path, **changes)
    with pytest.raises(UserError, match=f"{file}: .*{message}"):
        figures(data=str(file), ranks=())


def test_a_file_that_is_missing_or_has_no_sizes_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--data {tmp_path}/no.json: No such file"):
        figures(data=str(tmp_path / "no.json"))
    file = coco_file(tmp_path)
    file.write_text(file.read_text().replace('"height"', '"tall"'))
    with pytest.raises(UserError, match="a.jpg has no height and width"):
        figures(data=str(file))
