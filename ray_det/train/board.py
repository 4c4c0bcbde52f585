"""A small actor between train workers and the driver: progress one way, and how a run ended where no restart helps."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Board:
    """Holds what rank 0 tells until the driver fetches it: all messages, and the latest of the rest."""

    def __init__(self) -> None:
        self._updates: list[dict[str, Any]] = []
        self._ending: Exception | None = None
        self._stop = False

    def post(self, update: dict[str, Any]) -> bool:
        """Tell the driver; -> whether the run is asked to stop."""
        if self._updates and "message" not in self._updates[-1]:
            self._updates[-1] = update
        else:
            self._updates.append(update)
        return self._stop

    def stop(self) -> None:
        """Ask the run to stop after its next step."""
        self._stop = True

    def take(self) -> list[dict[str, Any]]:
        updates, self._updates = self._updates, []
        return updates

    def failed(self, why: str) -> None:
        """Tell the driver why workers are started again; not where they end for good, which it says itself."""
        if not self._ending:
            self.post({"message": why})

    def end(self, how: Exception) -> None:
        """Note an end after which the workers must not be started again; the first one counts."""
        self._ending = self._ending or how

    def ending(self) -> Exception | None:
        return self._ending


def start_board() -> Any:
    """Handle of a board that takes no CPU, lives on the driver's node and ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
