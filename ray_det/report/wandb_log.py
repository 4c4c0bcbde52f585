"""What a run's local wandb files already hold, so that a restart sends nothing twice and leaves no gap.

wandb keeps every run in `wandb/[offline-]run-<time>-<id>/run-<id>.wandb`, written by a process of its own in blocks:
when a training process is killed, the last second of records is gone although `wandb.log` had returned. What our own
`metrics.jsonl` says is therefore no proof of what wandb has; these files are.

Format: a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind a header of 7 bytes, each
record a protobuf `wandb_internal.Record`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_det.report.metrics_file import Kind, Record

BLOCK_BYTES = 32768
FILE_HEADER_BYTES = 7
RECORD_HEADER = struct.Struct("<IHB")  # crc32, length, type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
PICTURES = "val/pictures"


@dataclass
class Sent:
    """Highest `global_step` that wandb has, for each kind of record; -1 for none."""

    through: dict[Kind, int] = field(default_factory=lambda: {"step": -1, "epoch": -1, "test": -1})

    def has(self, kind: Kind, global_step: int) -> bool:
        return global_step <= self.through[kind]

    def add(self, kind: Kind, global_step: int) -> None:
        self.through[kind] = max(self.through[kind], global_step)

    def add_row(self, row: Record) -> None:
        """A history row of wandb: a step record, or an epoch's and a test's with `global_step`, or all in one."""
        if "train/batch_loss" in row:
            self.add("step", int(row["_step"]))
        if "global_step" not in row:
            return
        if any(key.startswith("test/") for key in row):
            self.add("test", int(row["global_step"]))
        # Pictures come before their epoch's record and do not prove it.
        keys = [key for key in row if not key.startswith(PICTURES)]
        if any(key == "learning_rate" or key.startswith(("val/", "train/epoch_")) for key in keys):
            self.add("epoch", int(row["global_step"]))


def sent_before(wandb_folder: Path, run_id: str) -> Sent | None:
    """What earlier starts of the run left in local files; None where there are no such files."""
    files = sorted(wandb_folder.glob(f"*run-*-{run_id}*/run-{run_id}.wandb"))
    if not files:
        return None
    sent = Sent()
    for path in files:
        for row in read_history(path):
            sent.add_row(row)
    return sent


def read_history(path: Path) -> Iterator[dict[str, Any]]:
    """History rows of a `.wandb` file, each with `_step`; stops at the first torn or broken record."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2 as pb

    for data in log_records(path.read_bytes()):
        record = pb.Record()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            record.ParseFromString(data)
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        except (DecodeError, ValueError, RecursionError):
            return
        if record.WhichOneof("record_type") == "history":
            yield row | {"_step": record.history.step.num}


def log_records(log: bytes) -> Iterator[bytes]:
    """The protobuf records of a `.wandb` file's bytes; stops where one is torn."""
    at, parts = FILE_HEADER_BYTES, b""
    while at + RECORD_HEADER.size <= len(log):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < RECORD_HEADER.size:  # too small for a header: zeros up to the next block
            at += left
            continue
        _, length, kind = RECORD_HEADER.unpack_from(log, at)
        at += RECORD_HEADER.size
        if at + length > len(log) or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        parts = log[at : at + length] if kind in (FULL, FIRST) else parts + log[at : at + length]
        at += length
        if kind in (FULL, LAST):
            yield parts
