"""The page of a comparison, from runs that are made up."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ray_det.report.compare_arm import ArmReport, ArmRun, Difference
from ray_det.report.compare_page import compare_page, figures, text_table
from ray_det.report.stability import stability_of
from ray_det.report.sweep_trial import SweepTrial
from tests.report.browser import IN_A_BROWSER, looked_at
from tests.report.test_page import EVIL, Reader


def run(seed: int, ap: float, jump: float = 1.0, state: str = "finished", error: str = "") -> ArmRun:
    losses = 1 + np.random.default_rng(seed).random(200) * 0.1
    losses[120] *= jump
    steps = tuple(
        {"global_step": i + 1, "train/batch_loss": float(loss), "train/epoch": i // 100, "train/grad_norm": 3.0}
        for i, loss in enumerate(losses)
    )
    curve = ((1, ap / 2), (2, ap)) if state == "finished" else ()
    test = ap + 0.01 if state == "finished" else None
    trial = SweepTrial(seed, {"seed": seed}, state, curve, test, 60.0, error)  # pyright: ignore[reportArgumentType]
    return ArmRun(seed, trial, steps, stability_of(steps))


REPORTS = [
    ArmReport("reference", {}, (run(0, 0.40), run(1, 0.42), run(2, 0.44))),
    ArmReport("zero", {"data.padding": "zero"}, (run(0, 0.30), run(1, 0.32)), Difference(-0.1, -0.15, -0.05)),
    ArmReport(
        "wild arm of many changes",
        {"optim.clip_norm": 0, "optim.schedule": "constant", "optim.weight_decay": 0.01},
        (run(0, 0.41, jump=9), run(1, 0.43)),
        Difference(0.0, -0.02, 0.02),
    ),
    ArmReport("lost", {"optim.lr": 9.0}, (run(0, 0, state="failed", error=EVIL),)),
]


def test_figures_are_of_the_runs_that_came_to_their_end():
    reference, zero, wild, lost = map(figures, REPORTS)
    assert (reference["val/AP"], reference["val/AP_sd"]) == (pytest.approx(0.42), pytest.approx(0.02))
    assert reference["test/AP"] == pytest.approx(0.43) and reference["test/AP_difference"] is None
    assert (zero["test/AP_difference_low"], zero["runs"], zero["changes"]) == (-0.15, 2, "data.padding zero")
    assert wild["largest_jump"] == pytest.approx(9, rel=0.1) and wild["jumps_share"] == pytest.approx(1 / 400)
    assert (lost["finished"], lost["runs"], lost["val/AP"]) == (0, 1, None) and lost["largest_jump"] < 1.2
    assert tuple(REPORTS[1].val_ap or ()) == pytest.approx((0.31, 0.0141), abs=1e-4)


def test_the_table_for_a_terminal_is_aligned():
    lines = text_table(REPORTS).splitlines()
    assert len(lines) == 1 + len(REPORTS)
    start = lines[0].index("difference")
    assert lines[2][start:].startswith("-0.100 [-0.150, -0.050]")
    assert lines[1][lines[0].index("val/AP") :].startswith("0.420 ± 0.020  0.430 ± 0.020  –")


def test_the_page_says_what_is_clear_and_fetches_nothing():
    page = compare_page("cells", REPORTS)
    read, text = Reader(page), " ".join(Reader(page).text)
    assert read.fetched == [] and not re.search(r"@import|url\(|\bnan\b", page)
    assert read.tags.count("svg") == 2 + 3 and page.count('class="interval"') == 2
    assert "0 of 1" in text and EVIL in text and EVIL not in page
    assert re.search(r'class="value">1</div><div class="more">zero<', page)  # one clear difference
    assert compare_page("none", [ArmReport("reference", {}, ())]).count("nothing recorded") == 2


@IN_A_BROWSER
def test_a_browser_draws_the_comparison(tmp_path):
    page = tmp_path / "compare.html"
    page.write_text(compare_page("cells", REPORTS))
    probe = looked_at(page, PROBE, tmp_path / "profile")
    assert len(probe["charts"]) == 5 and min(probe["charts"]) > 450
    zero, wild = probe["intervals"]
    assert zero["width"] > wild["width"] > 30 and zero["colour"] != wild["colour"]
    assert zero["middle"] < wild["middle"] == pytest.approx(probe["zero"], abs=1)
    assert len(probe["seeds"]) == 7 and max(probe["seeds"][:3]) > max(probe["seeds"][3:5])
    assert min(probe["losses"]) > 450 and not probe["overflow"]
    assert probe["rows"] and max(probe["rows"]) < 90  # no name is broken into letters
    assert all(inner <= outer for inner, outer in probe["tables"])


PROBE = """(() => {
const of = (selector) => [...document.querySelectorAll(selector)];
const box = (e) => e.getBoundingClientRect();
return {
  charts: of("figure.chart svg").map((e) => box(e).width), losses: of("polyline").map((l) => l.getBBox().width),
  intervals: of(".interval").map((g) => ({
    width: box(g.querySelector("line")).width, colour: getComputedStyle(g.querySelector("line")).stroke,
    middle: box(g.querySelector("circle")).x + box(g.querySelector("circle")).width / 2,
  })),
  zero: box(of("line.guide")[0]).x, seeds: of(".seed").map((c) => box(c).x),
  rows: of("tbody tr").map((r) => box(r).height), tables: of(".table").map((t) => [t.scrollWidth, t.clientWidth]),
  overflow: document.body.scrollWidth > innerWidth,
}; })()"""
