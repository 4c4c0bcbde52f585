"""Ray Tune's part of a sweep: which trial is next, which one stops, as many at once as there is room for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, cast

from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from ray_det.report.sweep_trial import SweepTrial
from ray_det.tune.config import SearchConfig
from ray_det.tune.proposals import Proposer
from ray_det.tune.trial import METRIC, TIME, Shared, run_trial

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial's run folder has its log
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables are printed whatever `verbose` says
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails in its first epoch has no val/AP
}
MEDIAN_OF = 3
"""Trials that the median rule wants before it stops any."""
A_BYTE = tune.PlacementGroupFactory([{"memory": 1}])
"""What Tune reserves for a trial's driver: something, but none of the CPUs that workers and loaders are counted by."""


class Line(Searcher):
    """The trials of a sweep in their order: those that were interrupted, then new ones.

    Args:
        interrupted: to go on with.
        fresh: the numbers of the new ones.
        value_of: of a trial that has ended, by number; see `Proposer.tell`.
    """

    def __init__(
        self,
        proposer: Proposer,
        interrupted: Sequence[SweepTrial],
        fresh: Sequence[int],
        value_of: Callable[[int], float | None],
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._proposer, self._value_of = proposer, value_of
        self._waiting = [{"number": trial.number, "params": trial.params} for trial in interrupted]
        self._fresh = list(fresh)
        self._running: dict[str, dict[str, Any]] = {}
        self._closed = False

    def close(self) -> None:
        """No further trial."""
        self._closed = True

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self._closed:
            return cast(Any, Searcher.FINISHED)
        if self._waiting:
            point = self._waiting.pop(0)
        else:
            number = self._fresh.pop(0)
            point = {"number": number, "params": self._proposer.propose(number)}
        self._running[trial_id] = point
        return point

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        point = self._running.pop(trial_id)
        value = self._value_of(point["number"])
        if value is not None:
            self._proposer.tell(point["number"], point["params"], value)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from the folders of its trials."""


@dataclass(frozen=True)
class _Named:
    """All that a rule asks of a trial."""

    trial_id: str


class Politely(FIFOScheduler):
    """Asks trials to end, in place of ending them, where a rule of Ray Tune stops them.

    It knows trials by their names, under which the rule is told what a sweep that goes on has had before.
    """

    def __init__(self, rule: TrialScheduler, stop: Callable[[str], None], known: Sequence[SweepTrial]) -> None:
        super().__init__()
        self._rule, self._stop = rule, stop
        self._seen: dict[str, set[int]] = {}
        self._trials: dict[str, Any] = {}
        rule.set_search_properties(METRIC, "max")
        for trial in known:
            for epoch, ap in trial.curve:
                self._decide(trial.name, epoch, ap)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if TIME in result:
            name = result["trial"]
            if self._decide(name, result[TIME], result[METRIC]) == TrialScheduler.STOP:
                self._stop(name)
        return TrialScheduler.CONTINUE

    def _decide(self, name: str, epoch: int, ap: float) -> str:
        if name not in self._trials:
            self._trials[name] = _Named(name)
            self._seen[name] = set()
            self._rule.on_trial_add(cast(Any, None), self._trials[name])
        if epoch in self._seen[name]:  # done again after an interruption
            return TrialScheduler.CONTINUE
        self._seen[name].add(epoch)
        return self._rule.on_trial_result(cast(Any, None), self._trials[name], {TIME: epoch, METRIC: ap})


def rule_of(config: SearchConfig, epochs: int) -> TrialScheduler:
    """
    ASHA is Li et al., https://arxiv.org/abs/1810.05934; the median rule Golovin et al., "Google Vizier", 2017.

    Args:
        epochs: of a whole trial, after which nothing is left to be stopped.
    """
    last = max(epochs - 1, 1)
    grace = min(config.grace_epochs or max(epochs // 4, 1), last)  # the first AP of an untrained detector is noise
    if config.scheduler == "asha":
        return AsyncHyperBandScheduler(
            TIME, max_t=last, grace_period=grace, reduction_factor=config.reduction, stop_last_trials=False
        )
    if config.scheduler == "median":
        never = float("inf")  # it would pause trials while it knows too few
        return MedianStoppingRule(
            TIME, grace_period=grace, min_samples_required=MEDIAN_OF, min_time_slice=cast(Any, never)
        )
    return FIFOScheduler()


class Silent(TrialProgressCallback):
    """In place of Tune's own, which tells of interrupted trials whatever `verbose` says."""

    def log_result(self, trial: Any, result: dict[str, Any], error: bool = False) -> None:
        pass

    def _print(self, msg: str) -> None:
        pass


def run_tuner(
    line: Line, scheduler: TrialScheduler, shared: Shared, *, trials: int, at_once: int, retries: int
) -> None:
    """Run `trials` trials to their end. Ray Tune's own records of them are not kept.

    Args:
        retries: times that a trial goes on whose driver was lost.
    """
    os.environ |= QUIET
    with TemporaryDirectory(prefix="ray_det_tune_") as scratch:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, shared=shared), A_BYTE),
            tune_config=tune.TuneConfig(
                search_alg=line, scheduler=scheduler, num_samples=trials, max_concurrent_trials=at_once
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                callbacks=[Silent()],
                failure_config=tune.FailureConfig(max_failures=retries),
            ),
        ).fit()
