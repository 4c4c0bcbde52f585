"""A rank's watch over itself: no wait is for ever, and none is silent.

A rank that stands still says where, and ends its process: Ray Train then starts the workers anew, from the last
checkpoint. A rank that is frozen cannot say anything; the others, who wait for it, do, and Ray's health check ends it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STALLED = 75  # exit status: sysexits.h calls it a failure that may pass
IDLE = ""


class Watch:
    """Knows what a rank does, since when.

    Args:
        timeout_s: seconds in one phase after which the rank is taken to hang.
        tell: called with the report, from a thread of the watch, before the process ends.
    """

    def __init__(self, rank: int, timeout_s: float, tell: Callable[[str], None]) -> None:
        self._rank, self._timeout_s, self._tell = rank, timeout_s, tell
        self._phase, self._step, self._since = IDLE, 0, 0.0
        self._thread_id = threading.get_ident()

    def at(self, phase: str, global_step: int | None = None) -> None:
        """The rank begins a phase; IDLE is not watched."""
        self._since = time.monotonic()  # first: the watching thread must not see a new phase with an old time
        self._phase = phase
        self._step = self._step if global_step is None else global_step

    @contextmanager
    def watching(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(min(1.0, self._timeout_s / 4)):
                if self._phase != IDLE and time.monotonic() - self._since > self._timeout_s:
                    self._end()

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _end(self) -> None:
        faulthandler.dump_traceback(sys.stderr)
        try:
            self._tell(self._report())
        finally:
            os._exit(STALLED)

    def _report(self) -> str:
        frame = sys._current_frames().get(self._thread_id)
        last = traceback.extract_stack(frame)[-1] if frame else None
        where = f", in {last.name} ({os.path.basename(last.filename)}:{last.lineno})" if last else ""
        what = f"{self._timeout_s:g} s without progress in: {self._phase}{where}"
        return f"stalled: rank {self._rank}, step {self._step}, {what}"
