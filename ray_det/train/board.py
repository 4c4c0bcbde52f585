"""A small actor between train workers and the driver: progress one way, and what cannot be mended by a restart."""

from __future__ import annotations

from typing import Any

import ray


class Board:
    """Holds what rank 0 tells until the driver fetches it: all messages, and the latest of the rest."""

    def __init__(self) -> None:
        self._updates: list[dict[str, Any]] = []
        self._failure: tuple[str, str] | None = None

    def post(self, update: dict[str, Any]) -> None:
        if self._updates and "message" not in self._updates[-1]:
            self._updates[-1] = update
        else:
            self._updates.append(update)

    def take(self) -> list[dict[str, Any]]:
        updates, self._updates = self._updates, []
        return updates

    def fail(self, kind: str, text: str) -> None:
        """Note a failure that would come again after a restart; the first one counts."""
        self._failure = self._failure or (kind, text)

    def failure(self) -> tuple[str, str] | None:
        return self._failure


def start_board() -> Any:
    """Handle of a board that takes no CPU and ends with the driver."""
    return ray.remote(Board).options(num_cpus=0).remote()
