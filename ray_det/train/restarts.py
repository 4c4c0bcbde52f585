"""Why Ray Train starts workers anew: said to the driver, for nothing of it is to be silent."""

from __future__ import annotations

from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.train import UserCallback


class Restarts(UserCallback):
    """Called in Ray Train's controller; posts to the board."""

    def __init__(self, board: ActorHandle) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._board.failed.remote(failures_in_short(worker_exceptions))


def failures_in_short(worker_exceptions: dict[int, Exception]) -> str:
    """One line: which ranks' processes ended, or else what they raised."""
    causes = {rank: getattr(e, "health_check_failure", e) for rank, e in sorted(worker_exceptions.items())}
    # Where one rank's process ends, the errors of the others only follow from it.
    ended = {rank: e for rank, e in causes.items() if isinstance(e, RayActorError)} or causes
    what = "; ".join(f"rank {rank}: {' '.join(str(e).split())[:300]}" for rank, e in ended.items())
    return f"worker failure: {what}"
