"""`metrics.jsonl`: one JSON object per logged record, always with `global_step`, flushed per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ray_det.retry import PATIENCE_S, patiently

Kind = Literal["step", "epoch", "test"]
Record = dict[str, Any]


def kind_of(record: Mapping[str, Any]) -> Kind:
    """Whether a record belongs to an optimizer step, to an epoch, or to the final test."""
    if "train/batch_loss" in record:
        return "step"
    return "test" if any(key.startswith("test/") for key in record) else "epoch"


def plain(value: Any) -> Any:
    """A JSON value: NumPy scalars become Python's, floats that are not finite become null."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_records(path: Path) -> Iterator[Record]:
    """Every whole record of the file; a line torn by a kill is passed over. Empty where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


class MetricsFile:
    """Appends records to a file that starts with the lines a checkpoint knew, and not one more.

    Args:
        path: the file; its folder exists.
        keep_lines: lines that the restored checkpoint had; what follows is cut, the steps are done again.

        patience_s: seconds for which the disk may be full.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, keep_lines: int, patience_s: float = PATIENCE_S) -> None:
        self.path = path
        self.lines = 0
        self._patience_s = patience_s
        self._file = path.open("ab", buffering=0)  # a buffer would not say how much of it a full disk has taken
        self._cut(keep_lines)

    def append(self, global_step: int, record: Mapping[str, Any]) -> Record:
        """Write one line and return it as it was written."""
        whole = {"global_step": int(global_step)} | {key: plain(value) for key, value in record.items()}
        rest = json.dumps(whole, allow_nan=False).encode() + b"\n"
        while rest:
            written = patiently(partial(self._file.write, rest), patience_s=self._patience_s)
            rest = rest[written:]
        self.lines += 1
        return whole

    def close(self) -> None:
        self._file.close()

    def _cut(self, keep_lines: int) -> None:
        end = 0
        with self.path.open("rb") as lines:
            while self.lines < keep_lines:
                line = lines.readline()
                if _parse(line) is None:
                    break
                end += len(line)
                self.lines += 1
        self._file.truncate(end)


def _parse(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "global_step" in record else None
