"""An arm of a comparison as it is reported: its runs, and how it differs from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

from ray_det.report.metrics_file import Record
from ray_det.report.stability import Stability
from ray_det.report.sweep_trial import SweepTrial


class Spread(NamedTuple):
    """Over an arm's runs; the standard deviation is that of a sample, None for a single run."""

    mean: float
    deviation: float | None


class Difference(NamedTuple):
    """From the reference, and where 95 % of the bootstrap's samples lie."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class ArmRun:
    seed: int
    trial: SweepTrial
    steps: tuple[Record, ...]  # of its optimizer steps
    stability: Stability


@dataclass(frozen=True)
class ArmReport:
    name: str
    params: dict[str, Any]  # what it changes, by dotted name of the field
    runs: tuple[ArmRun, ...]
    test_difference: Difference | None = None  # of test/AP; None: of the reference, or without common runs

    @property
    def finished(self) -> list[ArmRun]:
        return [run for run in self.runs if run.trial.state == "finished"]

    @property
    def val_ap(self) -> Spread | None:
        """Of the best epochs."""
        return spread([run.trial.best_ap for run in self.finished if run.trial.best_ap is not None])

    @property
    def test_ap(self) -> Spread | None:
        return spread([run.trial.test_ap for run in self.finished if run.trial.test_ap is not None])

    def stability(self, name: str) -> float | None:
        """Mean of a figure over the runs, also of those that failed; the largest one of what is a largest value."""
        values = [value for run in self.runs if (value := getattr(run.stability, name)) == value]
        if not values:
            return None
        return max(values) if name in ("largest_jump", "grad_norm_max") else mean(values)


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else None)
