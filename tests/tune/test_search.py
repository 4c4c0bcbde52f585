"""The order of trials, and what the rules of Ray Tune make of them, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
from ray.tune.search import Searcher

from ray_det.report.sweep_trial import SweepTrial
from ray_det.tune.config import SearchConfig
from ray_det.tune.proposals import Random
from ray_det.tune.search import Line, Politely, rule_of
from ray_det.tune.space import Domain

CURVES = {"trial_000": [0.1, 0.2, 0.3, 0.4], "trial_001": [0.05, 0.1, 0.1, 0.1], "trial_002": [0.2, 0.3, 0.4, 0.5]}


def scheduler(stopped: list[str], known: tuple[SweepTrial, ...] = (), **options: Any) -> Politely:
    config = SearchConfig.model_validate({"reduction": 2} | options)
    return Politely(rule_of(config, epochs=4), stopped.append, known)


def report(to: Politely, name: str, epoch: int, ap: float) -> None:
    result = {"epoch": epoch, "val/AP": ap, "trial": name}
    assert to.on_trial_result(None, None, result) == "CONTINUE"  # it ends by itself


def test_asha_asks_a_trial_to_stop_that_is_not_among_the_best():
    stopped: list[str] = []
    one = scheduler(stopped)
    for name, curve in CURVES.items():
        for epoch, ap in enumerate(curve, start=1):
            if name not in stopped:
                report(one, name, epoch, ap)
    assert stopped == ["trial_001"]


def test_nobody_is_stopped_at_the_last_epoch_or_in_the_grace():
    stopped: list[str] = []
    one = scheduler(stopped, grace_epochs=3)
    for name, curve in CURVES.items():
        for epoch in (1, 2):
            report(one, name, epoch, curve[epoch - 1])
    assert stopped == []
    last = scheduler(stopped)
    report(last, "trial_000", 1, 0.1)
    report(last, "trial_000", 2, 0.2)
    report(last, "trial_000", 4, 0.9)
    report(last, "trial_001", 1, 0.2)
    report(last, "trial_001", 4, 0.3)  # its first word after the rung at 2, which it passes
    assert stopped == []


def test_the_median_rule_stops_what_is_below_it():
    stopped: list[str] = []
    one = scheduler(stopped, scheduler="median")
    for i in range(3):
        for epoch in (1, 2, 3):
            report(one, f"trial_00{i}", epoch, 0.3 + 0.1 * i)
    report(one, "trial_003", 1, 0.1)
    assert stopped == ["trial_003"]


def test_none_stops_nobody():
    stopped: list[str] = []
    one = scheduler(stopped, scheduler="none")
    for name, curve in CURVES.items():
        for epoch, ap in enumerate(curve, start=1):
            report(one, name, epoch, ap)
    assert stopped == []


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_a_sweep_that_goes_on_compares_with_the_trials_it_has_had(rule):
    had = tuple(
        SweepTrial(i, {}, "finished", tuple((epoch, 0.3 + 0.1 * i) for epoch in (1, 2, 3, 4))) for i in range(3)
    )
    stopped: list[str] = []
    again = scheduler(stopped, had, scheduler=rule)
    assert stopped == []
    for trial in had:
        for _ in range(20):
            report(again, trial.name, 1, 0.0)  # validated again after a kill: it has been counted
    report(again, "trial_003", 1, 0.1)
    assert stopped == ["trial_003"]


def test_interrupted_trials_come_first_and_new_ones_follow():
    space = {"optim.lr": Domain("loguniform", (1e-5, 1e-3))}
    told: list[tuple[int, float]] = []

    class Listening(Random):
        def tell(self, number, params, value):
            told.append((number, value))

    interrupted = [SweepTrial(2, {"optim.lr": 0.5}, "running")]
    line = Line(Listening(space, 0), interrupted, [5, 7], {2: 0.25, 5: None}.get)
    assert line.suggest("a") == {"number": 2, "params": {"optim.lr": 0.5}}
    new = line.suggest("b")
    assert new == {"number": 5, "params": Random(space, 0).propose(5)}
    line.on_trial_complete("a", {})
    line.on_trial_complete("b", error=True)
    assert told == [(2, 0.25)]
    assert line.suggest("d") == {"number": 7, "params": Random(space, 0).propose(7)}
    line.close()
    assert line.suggest("c") == Searcher.FINISHED
