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
from contextlib import contextmanager, suppress

NOTICE_S = 15.0
"""Seconds in one phase after which the rank says so: a slow storage or disk is no reason to end, and to be seen."""
STALLED = 75  # exit status: sysexits.h calls it a failure that may pass
IDLE = ""


class Watch:
    """Knows what a rank does, since when.

    Args:
        who: in its reports: "rank 0".
        timeout_s: seconds in one phase after which the rank is taken to hang.
        tell: called with the report, from a thread of the watch, before the process ends.
    """

    def __init__(self, who: str, timeout_s: float, tell: Callable[[str], None]) -> None:
        self._who, self._timeout_s, self._tell = who, timeout_s, tell
        self._phase, self._since = IDLE, 0.0
        self.step, self.epoch = 0, 0  # where the rank is
        self._thread_id = threading.get_ident()

    def at(self, phase: str, global_step: int | None = None, epoch: int | None = None) -> None:
        """The rank begins a phase; IDLE is not watched."""
        self._since = time.monotonic()  # first: the watching thread must not see a new phase with an old time
        self._phase = phase
        self.step = self.step if global_step is None else global_step
        self.epoch = self.epoch if epoch is None else epoch

    @contextmanager
    def watching(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            noticed = 0.0
            while not ended.wait(min(1.0, self._timeout_s / 4)):
                since, spent_s = self._since, time.monotonic() - self._since
                if self._phase == IDLE or spent_s < min(NOTICE_S, self._timeout_s):
                    continue
                if spent_s > self._timeout_s:
                    self._end()
                if since != noticed:
                    with suppress(Exception):  # nobody listens: no reason to watch no longer
                        self._tell(f"slow: {self._report(spent_s)}")
                noticed = since

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _end(self) -> None:
        faulthandler.dump_traceback(sys.stderr)
        try:
            self._tell(f"stalled, and ended: {self._report(self._timeout_s)}")
        finally:
            os._exit(STALLED)

    def _report(self, spent_s: float) -> str:
        frame = sys._current_frames().get(self._thread_id)
        last = traceback.extract_stack(frame)[-1] if frame else None
        where = f", in {last.name} ({os.path.basename(last.filename)}:{last.lineno})" if last else ""
        return f"{self._who} at step {self.step} is in '{self._phase}' for {spent_s:.0f} s{where}"
