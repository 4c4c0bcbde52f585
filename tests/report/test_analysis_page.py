"""The analysis on the page, from a planted `analysis.json`; a browser looks at it where there is one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from ray_det.report.analysis_page import write_evaluation_page
from ray_det.report.confusion import confusion_figure, most_confused
from ray_det.report.page import write_page
from tests.report.browser import IN_A_BROWSER, looked_at
from tests.report.test_page import EVIL, Reader

KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")


def plant(folder: Path, classes: int, name: str = "class {}") -> Path:
    """An evaluation's folder. Class 1 has no objects; half of the objects of class 0 were found as class 2."""
    draws = np.random.default_rng(0)
    names = [name.format(i) for i in range(classes)]
    curves = [np.linspace(1, 0, 101).round(5).tolist() for _ in names]
    best = [{"f1": 0.7, "threshold": 0.4321, "precision": 0.8, "recall": 0.6} for _ in names]
    cells = [[i, i, 50] for i in range(classes) if i not in (0, 1)] + [[0, 0, 20], [0, 2, 50], [0, classes, 30]]
    cells += [[classes, 2, 7]] + [[i, int(draws.integers(2, classes)), 3] for i in range(3, classes)]
    f1 = np.minimum(np.linspace(0, 1, 101), np.linspace(1, 0, 101)).tolist()
    analysis = {
        "split": "val",
        "iou": 0.5,
        "background_iou": 0.1,
        "images": 4321,
        "classes": names,
        "objects": [100, 0, *[50] * (classes - 2)],
        "precision": [curves[0], None, *curves[2:]],
        "f1": {
            "thresholds": np.linspace(0, 1, 101).tolist(),
            "macro": f1,
            "micro": f1,
            "classes": [f1, None, *[f1] * (classes - 2)],
            "best": {"macro": best[0] | {"f1": 0.654}, "micro": best[0], "classes": [best[0], None, *best[2:]]},
        },
        "confusion": cells,
        "errors": {kind: {"count": 11 * (i + 1), "dAP50": 0.01 * (i + 1)} for i, kind in enumerate(KINDS)},
        "worst": [
            {"image_id": 9, "f1": 0.25, "right": 1, "wrong": 2, "missed": 3, "file_name": EVIL, "picture": "i.jpg"},
            {"image_id": 8, "f1": 0.5, "right": 1, "wrong": 2, "missed": 0, "file_name": "lost", "picture": None},
        ],
    }
    (folder / "analysis.json").write_text(json.dumps(analysis))
    summary = {f"val/AP/{name}": 0.5 for name in names} | {"val/AP": 0.345, "val/AP50": 0.567, "val/AP_small": 0.123}
    (folder / "summary.json").write_text(json.dumps(summary | {"val/AR_small": 0.234, "val/AP_large": -1.0}))
    (folder / "worst_images").mkdir()
    (folder / "worst_images" / "i.jpg").write_bytes(b"not really")
    return folder


def test_every_planted_number_is_on_the_page(tmp_path):
    page = write_evaluation_page(plant(tmp_path, 3), "cells").read_text()
    read = Reader(page)
    for value in ["cells", "0.345", "0.567", "0.654", "0.432", "0.800", "0.600", "0.123", "0.234", "–", "+0.060", "66"]:
        assert value in read.text, value
    assert any("4 321 images with 150 objects" in text for text in read.text)
    assert f"{EVIL}: F1 0.250, 1 right, 2 wrong, 3 missed" in read.text and "lost" not in page
    assert "50.0 %" in read.text  # of class 0 found as class 2
    assert "class 0 found as class 2: 50 of 100 (50.0%)" in read.text
    assert "class 0 missed: 30 of 100 (30.0%)" in read.text
    assert "no object left, found as class 2: 7 of 7 (100.0%)" in read.text
    assert any("at IoU 0.5, whatever its class. A detection with no object left" in text for text in read.text)
    assert read.tags.count("polyline") == (1 + 2) + (2 + 2)  # the mean and classes with objects


@pytest.mark.parametrize("name", [EVIL + "{}", "{}"])
def test_the_page_holds_no_foreign_markup_and_fetches_nothing(tmp_path, name):
    for classes in (3, 40):
        (folder := tmp_path / str(classes)).mkdir()
        page = write_evaluation_page(plant(folder, classes, name), EVIL).read_text()
        read = Reader(page)
        assert (read.tags.count("script"), read.fetched) == (1, [])
        assert EVIL not in page and not re.search(r"@import|url\(|\bnan\b", page)


def test_a_run_s_page_has_it_too(tmp_path):
    plant(tmp_path, 3)
    page = write_page(tmp_path).read_text()
    assert "Detections of val" in page and "<th>val AP50</th>" in page and "Training" in page
    (tmp_path / "analysis.json").write_text('{"split": ')
    assert "Detections of val" not in write_page(tmp_path).read_text()


@pytest.mark.parametrize("classes", [80, 1203])
def test_many_classes_stay_a_small_page(tmp_path, classes):
    page = write_evaluation_page(plant(tmp_path, classes), "many").read_text()
    assert len(page) < (500_000 if classes == 80 else 2_000_000)
    small = page.count("<figure title=")
    assert small == (79 if classes == 80 else 200)  # class 1 has no objects


def test_only_classes_that_occur_are_rows_of_the_matrix():
    names = [f"<{i}>" for i in range(50)]
    figure = confusion_figure(names, [[4, 4, 9], [4, 7, 2], [9, 50, 1], [40, 40, 8], [50, 11, 3]])
    columns = re.findall(r"rotate\(-90\)\"[^>]*>([^<]*)<", figure)
    assert columns == ["&lt;4&gt;", "&lt;7&gt;", "&lt;9&gt;", "&lt;11&gt;", "&lt;40&gt;", "missed"]
    rows = re.findall(r"text-anchor=\"end\"[^>]*>([^<]*)<", figure)
    assert rows == [*columns[:-1], "no object left"]
    assert "the 5 of 50 classes that are there or found" in figure and figure.count("<rect") == 5
    opacities = [float(v) for v in re.findall(r'fill-opacity="([^"]*)"', figure)]
    assert opacities == pytest.approx([(9 / 11) ** 0.5, (2 / 11) ** 0.5, 1, 1, 1], abs=0.005)
    many = confusion_figure([str(i) for i in range(300)], [[i, i, 1] for i in range(300)] + [[250, 251, 1]])
    assert "the 100 of 300 classes with the most errors" in many and ">250<" in many and ">200<" not in many
    assert all("no object left" in confusion_figure(some, []) for some in ([], names))


def test_frequent_confusions_are_of_two_classes():
    found = most_confused(["a", "b"], [[0, 0, 6], [0, 1, 2], [0, 2, 9], [1, 0, 3], [2, 1, 9]])
    assert [tuple(one) for one in found] == [("b", "a", 3, 1.0), ("a", "b", 2, 2 / 17)]


PROBE = """(() => {
const of = (selector) => [...document.querySelectorAll(selector)];
const size = (e) => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
const colour = (e) => getComputedStyle(e).fill;
return {
  charts: of("svg[data-chart]").map(size), lines: of("svg[data-chart] polyline").map((l) => l.getBBox().width),
  small: of(".small svg").map(size), smallLines: of(".small polyline").map((l) => l.getBBox().width),
  cells: of(".matrix rect").map(size), matrix: size(of(".matrix svg")[0]),
  names: of(".matrix svg > text").map((t) => parseFloat(getComputedStyle(t).fontSize) * size(of(".matrix svg")[0])[0]
    / of(".matrix svg")[0].viewBox.baseVal.width),
  right: colour(of(".matrix .cell.s0")[0]), wrong: colour(of(".matrix .cell.s1")[0]),
  bars: of(".bars td.bar div").map((d) => size(d)[0]), background: getComputedStyle(document.body).backgroundColor,
  overflow: document.body.scrollWidth > innerWidth,
}; })()"""


@IN_A_BROWSER
@pytest.mark.parametrize("classes, dark", [(3, False), (80, True)])
def test_a_browser_draws_the_analysis(tmp_path, classes, dark):
    page = write_evaluation_page(plant(tmp_path, classes), "looked at")
    probe = looked_at(page, PROBE, tmp_path / "profile", dark=dark)
    assert len(probe["charts"]) == 2 and min(width for width, _ in probe["charts"]) > 450
    assert min(probe["lines"]) > 450
    assert len(probe["small"]) == len(probe["smallLines"]) == (79 if classes == 80 else 0)
    assert all(width > 90 for width in probe["smallLines"])
    side = min(min(cell) for cell in probe["cells"])
    assert side > (9 if classes == 80 else 45) and min(probe["names"]) > 8
    assert len(probe["cells"]) > classes and probe["right"] != probe["wrong"]
    assert probe["bars"][:6] == sorted(probe["bars"][:6]) and probe["bars"][5] > 100
    assert probe["background"] == ("rgb(18, 21, 26)" if dark else "rgb(246, 247, 249)")
    assert not probe["overflow"]
