"""A trial of a sweep as it is reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class SweepTrial:
    """`stopped` is by the scheduler; `running` is not at its end, or was interrupted there."""

    number: int
    params: dict[str, Any]  # by dotted name of the field
    state: State
    curve: tuple[tuple[int, float], ...] = ()  # (epochs done, val/AP), where it was evaluated
    test_ap: float | None = None
    seconds: float | None = None  # of the start that ended it
    error: str = ""

    @property
    def name(self) -> str:
        return trial_name(self.number)

    @property
    def best_ap(self) -> float | None:
        return max((ap for _, ap in self.curve), default=None)

    @property
    def epochs(self) -> int:
        """After which it was evaluated last."""
        return self.curve[-1][0] if self.curve else 0

    @property
    def ended(self) -> bool:
        return self.state != "running"


def trial_name(number: int) -> str:
    """Of its run folder, inside the sweep's."""
    return f"trial_{number:03d}"


def winner(trials: list[SweepTrial]) -> SweepTrial | None:
    """The best of those that were trained to their end, or else of all that were evaluated."""
    evaluated = [trial for trial in trials if trial.best_ap is not None]
    finished = [trial for trial in evaluated if trial.state == "finished"]
    return max(finished or evaluated, key=lambda trial: trial.best_ap or 0.0, default=None)
