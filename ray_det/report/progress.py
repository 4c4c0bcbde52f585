"""What the driver shows while workers train, and the table at the end."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

PLAIN_INTERVAL_S = 10.0
LIVE_INTERVAL_S = 0.1
BAR_WIDTH = 20
COLUMNS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100")


class ProgressPrinter:
    """On a terminal one line that is rewritten in place; elsewhere a plain line every ten seconds and at epoch ends.

    Args:
        stream: where to write.
        clock: seconds; an argument for the tests.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty()
        self._clock = clock
        self._written_at = -math.inf
        self._phase = ""
        self._open = False  # whether a live line stands on the terminal

    def update(self, state: Mapping[str, Any]) -> None:
        """Show the state of training; every key may be missing.

        Args:
            state: epoch (from 0), epochs, step, steps (of the epoch), global_step, total_steps, loss, lr, images_per_s,
                eta_s, phase ("training", "validating", "testing"), message: a line to be kept, shown at once.
        """
        message = state.get("message")
        if message:
            self._keep(str(message))
        line = _line(state)
        if line and self._due(state):
            self._written_at = self._clock()
            self._show(line)

    def close(self) -> None:
        """Leave the last line standing. A second call does nothing."""
        if self._open:
            self._write("\n")
            self._open = False

    def _due(self, state: Mapping[str, Any]) -> bool:
        phase = str(state.get("phase", ""))
        new_phase, self._phase = phase != self._phase, phase
        interval = LIVE_INTERVAL_S if self._live else PLAIN_INTERVAL_S
        ended = state.get("steps") is not None and state.get("step") == state.get("steps") and phase == "training"
        return new_phase or ended or self._clock() - self._written_at >= interval

    def _keep(self, message: str) -> None:
        self._write(("\r\x1b[K" if self._open else "") + message + "\n")
        self._open = False

    def _show(self, line: str) -> None:
        if not self._live:
            return self._write(line + "\n")
        width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be rewritten
        self._write("\r\x1b[K" + line[:width])
        self._open = True

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def results_table(summary: Mapping[str, Any]) -> str:
    """Val and test AP side by side, and where F1 is best; "-" for a number that is missing or undefined."""
    splits = [split for split in ("val", "test") if any(f"{split}/{column}" in summary for column in COLUMNS)]
    if not splits:
        return "no evaluation results"
    rows = [["", *COLUMNS]]
    rows += [[split, *(_share(summary.get(f"{split}/{column}")) for column in COLUMNS)] for split in splits]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    for split in splits:
        if f"{split}/best_f1" in summary:
            f1, score = (_share(summary[f"{split}/best_f1{what}"]) for what in ("", "_threshold"))
            lines.append(f"best F1 on {split}: {f1}, of detections with a score from {score}")
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def duration(seconds: float) -> str:
    """3725 -> "1:02:05", 65 -> "1:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _line(state: Mapping[str, Any]) -> str:
    parts = []
    total, done = state.get("total_steps"), state.get("global_step")
    if total and done is not None:
        filled = round(BAR_WIDTH * min(done / total, 1))
        parts.append(f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done}/{total}")
    phase = state.get("phase")
    if phase and phase != "training":
        parts.append(str(phase))
    if state.get("epoch") is not None:
        parts.append(f"epoch {state['epoch'] + 1}" + _of(state.get("epochs")))
    if state.get("step") is not None:
        parts.append(f"step {state['step']}" + _of(state.get("steps")))
    for key, show in (("loss", "loss {:.4f}"), ("lr", "lr {:.2e}"), ("images_per_s", "{:.1f} img/s")):
        if state.get(key) is not None:
            parts.append(show.format(state[key]))
    eta_s = state.get("eta_s")
    if eta_s is not None and math.isfinite(eta_s):
        parts.append(f"ETA {duration(eta_s)}")
    return "  ".join(parts)


def _of(total: int | None) -> str:
    return "" if total is None else f"/{total}"


def _share(value: Any) -> str:
    return "-" if value is None or not math.isfinite(value) or value < 0 else f"{value:.3f}"
