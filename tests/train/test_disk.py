"""A disk that is full for a while, or for good: a real file system that is mounted for it."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from ray_det.storage import StorageError
from tests.train.disturb import EPOCHS, STEPS, config, when_at
from tests.train.runner import records, run_alone
from tests.train.test_equivalence import same_checkpoint


@pytest.fixture
def disk(tmp_path):
    """A mounted file system of 300 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no right to mount a file system: {mount.stderr.strip()}")
    yield folder
    # Lazy: Ray's last processes may still have a log open in it.
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Take all but a few kilobytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * (1 << 20)):
                pass
        except OSError:
            pass
    return filler


def asked(small_coco: dict[str, Path], storage: Path, **workers: Any) -> dict[str, Any]:
    made = config(small_coco, storage)
    made["workers"] |= workers
    return {"config": made | {"wandb": {"mode": "disabled"}}, "world": 1}


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_time(small_coco, disk, tmp_path, caplog):
    undisturbed = run_alone(asked(small_coco, tmp_path / "undisturbed"))

    def fill_for_a_while() -> None:
        filler = fill(disk)
        threading.Timer(2, filler.unlink).start()

    with when_at(disk / "run", STEPS + 1, fill_for_a_while) as filled, caplog.at_level(logging.WARNING):
        run = run_alone(asked(small_coco, disk))
    assert filled and any("o space left" in record.message for record in caplog.records)
    assert records(run) == records(undisturbed)
    last = f"kept/checkpoint_{EPOCHS * STEPS:08d}_test"
    same_checkpoint(run / last, undisturbed / last)


def test_a_disk_that_stays_full_is_one_clear_error_and_loses_no_checkpoint(small_coco, disk):
    with when_at(disk / "run", STEPS + 1, lambda: fill(disk)):
        with pytest.raises((StorageError, OSError), match="[Nn]o space left"):
            run_alone(asked(small_coco, disk, storage_timeout_s=1))
    kept = disk / "run" / "kept" / f"checkpoint_{STEPS:08d}_validate"
    assert sorted(os.listdir(kept)) == ["ema.safetensors", "model.safetensors", "optimizer.pt", "state.json"]
    assert all((staged / "state.json").exists() for staged in (disk / "run" / "staging").iterdir())
