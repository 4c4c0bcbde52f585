"""A small actor between a sweep's driver and its trials: lines one way, and which trials are to stop."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

BY_SCHEDULER = -1
"""What asks a trial to stop, where it is no signal."""


class Desk:
    """Trials go by name. Who stops a trial first is who stopped it."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._stopped: dict[str, int] = {}
        self._all = 0

    def stop(self, trial: str) -> None:
        """The scheduler stops a trial: it ends after its next step, and that is its result."""
        self._stopped.setdefault(trial, BY_SCHEDULER)

    def stop_all(self, signal_number: int) -> None:
        """The sweep is interrupted: trials end after their next step, and go on when it does."""
        self._all = signal_number

    def asked(self, trial: str) -> int:
        """`BY_SCHEDULER`, the number of a signal, or 0: the trial is to go on."""
        return self._stopped.get(trial, self._all)

    def tell(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


def start_desk() -> Any:
    """Handle of a desk that takes no CPU, lives on the driver's node and ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote()
