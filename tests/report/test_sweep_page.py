"""The page of a sweep, from trials that are made up."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ray_det.report.sweep_charts import Parameter, spanned
from ray_det.report.sweep_page import importance, sweep_page
from ray_det.report.sweep_trial import SweepTrial, winner
from tests.report.browser import IN_A_BROWSER, looked_at
from tests.report.test_page import EVIL, Reader

RNG = np.random.default_rng(0)


def trial(number: int, state: str = "finished", lr: float | None = None, padding: str = "mean") -> SweepTrial:
    """val/AP is best at a learning rate of 1e-3, and has nothing to do with the weight decay."""
    rate = 10 ** (-5 + 4 * number / 20) if lr is None else lr
    top = 0.5 - 0.1 * (np.log10(rate) + 3) ** 2
    curve = tuple((epoch, float(top * epoch / 5)) for epoch in range(1, 6 if state == "finished" else 3))
    params = {"optim.lr": rate, "optim.weight_decay": float(10 ** RNG.uniform(-6, -2)), "data.padding": padding}
    test = 0.4 if state == "finished" else None
    return SweepTrial(number, params, state, curve, test, seconds=60.0)  # pyright: ignore[reportArgumentType]


TRIALS = [trial(i, "stopped" if i % 3 else "finished", padding="mean" if i % 2 else "zero") for i in range(20)]
SEARCHED = ("optim.lr", "optim.weight_decay", "data.padding")


def page_of(trials: list[SweepTrial]) -> str:
    return sweep_page("cells", trials, SEARCHED, SEARCHED[:2], winner(trials))


def test_the_page_shows_every_trial_and_fetches_nothing():
    page = page_of(TRIALS)
    read = Reader(page)
    assert read.fetched == [] and not re.search(r"@import|url\(", page)
    assert read.tags.count("svg") == 1 + 3 + 1  # curves, three pairs, all in parallel
    assert read.tags.count("polyline") == 2 * len(TRIALS)
    assert page.count('class="cross') == sum(one.state == "stopped" for one in TRIALS)
    text = " ".join(read.text)
    assert "20 trials" in text and "13 stopped" in text and "Importance" in text
    best = winner(TRIALS)
    assert best and f"<tr class=best><td>{best.name}</td>" in page
    assert "color-scheme: light dark" in page
    assert not re.search(r"\bnan\b|\binf\b", page)


def test_importance_is_of_what_matters():
    lr, decay, padding = (Parameter.of(name, TRIALS, log=name != "data.padding") for name in SEARCHED)
    shares = [importance(one, TRIALS) for one in (lr, decay, padding)]
    assert shares[0] is not None and shares[0] > 0.9
    assert all(share is not None and share < 0.3 for share in shares[1:])
    assert importance(lr, TRIALS[:5]) is None


def test_no_trial_one_trial_and_failed_ones():
    assert page_of([]).count("nothing recorded") == 2
    assert "nan" not in page_of([trial(3)])
    failed = SweepTrial(1, dict(trial(0).params), "failed", error=EVIL)
    page = page_of([trial(0), failed])
    assert EVIL in " ".join(Reader(page).text) and EVIL not in page


def test_trials_of_another_space_are_in_the_charts_of_the_fields_they_have():
    others = [SweepTrial(20, {"optim.lr": 1e-4, "seed": 2}, "finished", ((1, 0.3),)), SweepTrial(21, {}, "failed")]
    page = page_of([*TRIALS, *others])
    assert page.count('class="disc"') == 3 * len(TRIALS)  # of each pair of fields
    assert page.count("<polyline") == len(TRIALS) + 1 + len(TRIALS)
    assert "<td>trial_020</td><td>0.0001</td><td>–</td><td>–</td>" in page
    share = importance(Parameter.of("data.padding", [*TRIALS, *others], log=False), [*TRIALS, *others])
    assert share == importance(Parameter.of("data.padding", TRIALS, log=False), TRIALS)
    assert page_of(others).count("nothing recorded") == 4


def test_a_log_axis_has_decades_of_one_length():
    axis = spanned([1e-5, 1e-3], 0, 100, log=True)
    assert axis.pixel(1e-4) - axis.pixel(1e-5) == pytest.approx(axis.pixel(1e-3) - axis.pixel(1e-4))
    assert spanned([0.5, 0.5], 0, 100).pixel(0.5) == pytest.approx(50)


PROBE = """(() => {
const of = (selector) => [...document.querySelectorAll(selector)];
const width = (e) => e.getBoundingClientRect().width;
return {
  charts: of("figure.chart svg").map(width), lines: of("polyline").map((l) => l.getBBox().width),
  discs: of(".disc").map((d) => getComputedStyle(d).fill), crosses: of(".cross").length,
  bars: of("td.bar div").map(width), background: getComputedStyle(document.body).backgroundColor,
  overflow: document.body.scrollWidth > innerWidth,
}; })()"""


@IN_A_BROWSER
def test_a_browser_draws_the_sweep(tmp_path):
    page = tmp_path / "sweep.html"
    page.write_text(page_of(TRIALS))
    probe = looked_at(page, PROBE, tmp_path / "profile", dark=True)
    assert len(probe["charts"]) == 5 and min(probe["charts"]) > 450
    assert len(probe["lines"]) == 2 * len(TRIALS) and min(probe["lines"]) > 100
    assert len(set(probe["discs"])) > 10 and probe["crosses"] == 13
    assert probe["bars"][0] > 5 * max(probe["bars"][1:])  # what matters
    assert probe["background"] == "rgb(18, 21, 26)" and not probe["overflow"]
