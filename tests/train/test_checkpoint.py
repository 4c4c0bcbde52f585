"""A checkpoint is read as it was written, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ray_det.train.checkpoint import Checkpoint, Snapshot, TrainState
from ray_det.train.job import RunFacts
from ray_det.types import UserError
from tests.models.zoo import CLASSES, FAMILIES, build

CONFIG = {"model": FAMILIES["fcos"].model_dump()}


def save(folder: Path, step: int) -> None:
    detector = build("fcos")
    optimizer = torch.optim.AdamW(detector.parameters())
    Snapshot.of(detector, optimizer, TrainState(global_step=step), RunFacts(CONFIG, CLASSES, {}, "id")).write(folder)


def test_one_is_written_over_another(tmp_path):
    for step in (1, 2):
        save(tmp_path / "best", step)
        (tmp_path / "best" / "left over").touch()
    save(tmp_path / "best", 3)
    assert Checkpoint.open(tmp_path / "best").state.global_step == 3
    assert {p.name for p in (tmp_path / "best").iterdir()} == {"model.safetensors", "optimizer.pt", "state.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_changed_bit_a_cut_and_a_missing_file_are_named(tmp_path, name):
    save(tmp_path, 1)
    content = bytearray((tmp_path / name).read_bytes())
    for at in (0, len(content) // 2, len(content) - 1):
        content[at] ^= 1
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is not as it was written .SHA-256"):
            Checkpoint.open(tmp_path)
        content[at] ^= 1
    (tmp_path / name).write_bytes(content)
    assert Checkpoint.open(tmp_path).state.global_step == 1
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{name} is not as it was written"):
        Checkpoint.open(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        Checkpoint.open(tmp_path)
