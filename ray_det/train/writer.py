"""Checkpoints are written by a thread, one after the other, while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

log = logging.getLogger(__name__)


class Writer:
    """Does one piece of work at a time. What fails is raised by the next call that looks."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Begin it, after `wait`: nobody needs memory for two."""
        self.wait()
        self._pending = self._pool.submit(work)

    def then(self, work: Callable[[], None]) -> None:
        """Begin it, which holds little memory, once that is done which is being done; does not wait."""
        before = self._pending

        def both() -> None:
            if before is not None:
                before.result()  # what it raised is not lost
            work()

        self._pending = self._pool.submit(both)

    def check(self) -> None:
        """Raises what a piece of work raised that has ended by now."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until all is done; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let it finish: a run that fails loses no checkpoint that it had begun."""
        try:
            self.wait()
        except Exception as error:
            log.warning("a checkpoint could not be kept: %s", error)
        self._pool.shutdown()
