"""Checkpoints that are written while training goes on are those of the step that asked for them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_det.train.checkpoint import Checkpoint, HostMemory, Snapshot, TrainState
from ray_det.train.job import RunFacts
from ray_det.train.writer import Writer
from tests.models.zoo import CLASSES, FAMILIES, build
from tests.train.disturb import config, steps_done
from tests.train.runner import records, run_alone
from tests.train.test_equivalence import same_checkpoint

FACTS = RunFacts({"model": FAMILIES["detr"].model_dump()}, CLASSES, {}, "id")


@pytest.mark.parametrize("family", ["fcos", "detr"])
def test_a_snapshot_stays_what_it_was(tmp_path, family):
    detector, memory = build(family), HostMemory()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=0.1)
    for parameter in detector.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    Snapshot.of(detector, optimizer, TrainState(), FACTS).write(tmp_path / "at once")
    copied = Snapshot.of(detector, optimizer, TrainState(), FACTS, memory=memory)
    optimizer.step()
    copied.write(tmp_path / "later")
    same_checkpoint(tmp_path / "later", tmp_path / "at once")
    Checkpoint.open(tmp_path / "later").load_model(build(family))  # shared tensors are found again

    Snapshot.of(detector, optimizer, TrainState(), FACTS).write(tmp_path / "second at once")
    again = Snapshot.of(detector, optimizer, TrainState(), FACTS, memory=memory)
    again.write(tmp_path / "second later")
    same_checkpoint(tmp_path / "second later", tmp_path / "second at once")
    assert all(again.weights[name] is tensor for name, tensor in copied.weights.items())  # no new memory


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing takes a while; gives the number of steps that were logged in it, by run and checkpoint."""
    meanwhile: dict[tuple[str, str], int] = {}
    write = Snapshot.write

    def slowly(snapshot: Snapshot, staged: Path) -> None:
        run = staged.parents[1]
        began = steps_done(run)
        time.sleep(0.3)
        write(snapshot, staged)
        meanwhile[run.parent.name, staged.name] = steps_done(run) - began

    monkeypatch.setattr(Snapshot, "write", slowly)
    return meanwhile


def test_training_goes_on_while_checkpoints_are_written_and_they_are_the_same(small_coco, tmp_path, slow_disk):
    runs = {}
    for name, asynchronous in (("on", True), ("off", False)):
        asked: dict[str, Any] = config(small_coco, tmp_path / name) | {"wandb": {"mode": "disabled"}}
        asked["train"] |= {"async_checkpoints": asynchronous, "epochs": 2}
        runs[name] = run_alone({"config": asked, "world": 1})
    assert records(runs["on"]) == records(runs["off"])
    kept = [sorted(path.name for path in (run / "kept").iterdir()) for run in runs.values()]
    assert kept[0] == kept[1] and len(kept[0]) == 6  # after steps 5, 10 and 15, after both epochs, before the test
    for name in kept[0]:
        same_checkpoint(runs["on"] / "kept" / name, runs["off"] / "kept" / name)
    same_checkpoint(runs["on"] / "best", runs["off"] / "best")
    assert all(steps == 0 for (run, _), steps in slow_disk.items() if run == "off")
    assert slow_disk["on", "checkpoint_00000005_train"] > 0


def test_a_writer_does_one_thing_at_a_time_and_tells_what_failed():
    writer, done, go = Writer(), [], threading.Event()
    writer.submit(lambda: (go.wait(10), done.append(1))[1])
    writer.check()  # not done is no error
    assert done == []
    go.set()
    writer.submit(lambda: done.append(2))
    assert done[0] == 1
    writer.wait()
    assert done == [1, 2]

    def fail() -> None:
        raise OSError("full")

    writer.submit(fail)
    with pytest.raises(OSError, match="full"):
        writer.wait()
    writer.wait()  # told once
    writer.submit(fail)
    writer.close()
