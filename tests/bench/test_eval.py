"""The scoring benchmark asserts that all numbers are equal, and its objects are like COCO's."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_det.bench import eval as bench
from ray_det.bench.measure import Figure


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
