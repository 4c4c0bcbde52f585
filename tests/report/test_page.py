"""The report page, from planted files; a browser looks at it where there is one."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ray_det.report.charts import Chart, Series, log_ticks, number, render, round_ticks, running_median, thinned
from ray_det.report.page import write_page
from tests.report.browser import IN_A_BROWSER, looked_at

EVIL = "<script>alert('x')</script>&\""


def plant(folder: Path, epochs: int = 3, steps: int = 20, spike: int = 31) -> Path:
    """A run folder with everything in it."""
    lines, k = [], 0
    for epoch in range(epochs):
        for _ in range(steps):
            k += 1
            loss = 7.25 if k == spike else None if k == 5 else 1 / (1 + k / 20)
            record = {"global_step": k, "train/batch_loss": loss, "train/epoch": epoch, "train/learning_rate": 5e-5 / k}
            lines.append(record | {"train/grad_norm": 2.0 + k % 3, "train/loss_box": 0.4, f"train/loss_{EVIL}": 0.2})
        val = {"val/loss": 0.9, "val/AP": 0.1 * (epoch + 1), "val/AP50": 0.2 * (epoch + 1)}
        lines.append({"global_step": k, "train/epoch": epoch, "train/epoch_avg_loss": 0.5} | val)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"global_st')
    summary = {"val/AP": 0.3123, "val/AP50": 0.6321, "test/AP": 0.2987, "test/AP50": 0.6111, "best_step": steps * 2}
    summary |= {"global_step": k, "images_per_s": 7.74, "data_wait_share": 0.0213, "padded_share": 0.0456}
    summary |= {"wall_s": 3725.0, "time_to_first_step_s": 65.0, "skipped_steps": 4}
    summary |= {"val/AP/cat": 0.4321, f"val/AP/{EVIL}": -1.0, "test/AP/cat": 0.3999, f"test/AP/{EVIL}": 0.1234}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(
        f"name: planted\noptim:\n  clip_norm: 1.5\ndata:\n  train: {json.dumps(EVIL)}\n"
    )
    (folder / "pictures").mkdir()
    (folder / "pictures" / "step_00000060_00_image_42.jpg").write_bytes(b"not really")
    return folder


class Reader(HTMLParser):
    """Text of the page, its tags, and attributes that would fetch something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.fetched = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and not str(v).startswith("data:")]

    def handle_data(self, data):
        self.text.append(data.strip())


def test_every_planted_number_is_on_the_page(tmp_path):
    page = write_page(plant(tmp_path)).read_text()
    read = Reader(page)
    values = ["0.312", "0.632", "0.299", "0.611", "7.74", "1:02:05", "4.6 %", "2.1 %", "4", "40", "of 60"]
    for value in [*values, "first step after 1:05", "0.432", "0.400", "0.123", "clipped at 1.5", "image 42, step 60"]:
        assert value in read.text, value
    assert "data:image/jpeg;base64,bm90IHJlYWxseQ==" in page
    assert read.tags.count("polyline") == 2 + 2 + 2 + 2 + 1 + 2
    assert "3 epochs, 60 steps" in page
    assert "7.25" in page  # the spike


def test_the_page_holds_no_foreign_markup_and_fetches_nothing(tmp_path):
    page = write_page(plant(tmp_path)).read_text()
    read = Reader(page)
    assert read.tags.count("script") == 1
    assert EVIL in read.text
    assert EVIL not in page
    assert read.fetched == []
    assert not re.search(r"@import|url\(", page)


@pytest.mark.parametrize("missing", ["summary.json", "config.yaml", "metrics.jsonl", "pictures"])
def test_a_page_of_what_is_there(tmp_path, missing):
    plant(tmp_path)
    shutil.rmtree(tmp_path / missing) if missing == "pictures" else (tmp_path / missing).unlink()
    page = write_page(tmp_path).read_text()
    assert ("Predictions" in page) == (missing != "pictures")
    assert ("not finished" in page) == (missing == "summary.json")
    assert ("nothing recorded" in page) == (missing == "metrics.jsonl")
    assert ("clipped at" in page) == (missing not in ("config.yaml", "metrics.jsonl"))
    if missing == "summary.json":
        assert "0.300" in Reader(page).text  # the best epoch's AP


def test_an_empty_folder_and_broken_files(tmp_path):
    assert "nothing recorded" in write_page(tmp_path).read_text()
    (tmp_path / "summary.json").write_text('{"val/AP": 0.')
    (tmp_path / "config.yaml").write_text("a: [")
    assert "not finished" in write_page(tmp_path).read_text()


def test_one_epoch(tmp_path):
    page = write_page(plant(tmp_path, epochs=1)).read_text()
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    assert 'class="dot s1"' in page


def test_thinning_keeps_extremes_order_and_ends():
    ys = np.sin(np.arange(100_000) / 3000) + np.random.default_rng(0).normal(0, 0.1, 100_000)
    ys[77_777], ys[12_345] = 9.0, -9.0
    points: list[tuple[float, float]] = list(enumerate(ys.tolist()))
    thin = thinned(points, 800)
    assert 600 < len(thin) <= 802
    assert {(77_777, 9.0), (12_345, -9.0), points[0], points[-1]} <= set(thin)
    assert thin == sorted(thin)
    assert thinned(points[:800], 800) == points[:800]


def test_running_median_passes_over_a_spike():
    points = [(float(i), 100.0 if i == 50 else 1.0) for i in range(101)]
    median = running_median(points)
    assert {y for _, y in median} == {1.0}
    assert (median[0][0], median[-1][0]) == (0.0, 100.0)
    assert running_median([]) == []


def test_ticks_are_round():
    assert round_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert round_ticks(1, 3, whole=True) == [1, 2, 3]
    assert log_ticks(0.2, 30) == [0.2, 0.5, 1, 2, 5, 10, 20]
    assert log_ticks(1e-6, 1) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert [number(v) for v in (20_000, 0.05, 1e-6, 2_500_000, 0, 2.5e-4)] == [
        "20k",
        "0.05",
        "1e-6",
        "2.5M",
        "0",
        "2.5e-4",
    ]


def test_points_lie_on_their_axes():
    """Ends of a line are ends of the axes: x 58..546, y 0 at 228; on a log axis a tenth is one decade lower."""
    svg = render(Chart("t", "x", "y", [Series("a", [0, 10], [0.0, 1.0])]))
    (points,) = re.findall(r'polyline[^>]*points="([^"]*)"', svg)
    assert points.startswith("58.0,228.0 546.0,")
    svg = render(Chart("t", "x", "y", [Series("a", [0, 1, 2], [1.0, 10.0, 100.0])], scale="log"))
    (points,) = re.findall(r'polyline[^>]*points="([^"]*)"', svg)
    a, b, c = (float(p.split(",")[1]) for p in points.split())
    assert a - b == pytest.approx(b - c, abs=0.15)
    assert a - b > 80


PROBE = """(() => {
const svgs = [...document.querySelectorAll("svg[data-chart]")];
const lines = svgs.map((s) => [...s.querySelectorAll("polyline")].map((l) => l.getBBox()));
const right = svgs[0].getBoundingClientRect().right;
svgs[0].dispatchEvent(new PointerEvent("pointermove", {clientX: right - 30, clientY: 300}));
return {
  charts: svgs.length, widths: lines.map((l) => Math.min(...l.map((b) => b.width))),
  heights: lines.map((l) => Math.max(...l.map((b) => b.height))), seen: svgs[0].getBoundingClientRect().width,
  tip: document.querySelector(".tip:not([hidden])")?.textContent, overflow: document.body.scrollWidth > innerWidth,
}; })()"""


@IN_A_BROWSER
def test_a_browser_draws_the_charts(tmp_path):
    page = write_page(plant(tmp_path))
    probe = looked_at(page, PROBE, tmp_path / "profile")
    assert probe["charts"] == 6
    assert min(probe["widths"]) > 450
    assert min(probe["heights"][:2] + probe["heights"][4:5]) > 100
    assert probe["seen"] > 450
    assert "running median" in probe["tip"]
    assert not probe["overflow"]
