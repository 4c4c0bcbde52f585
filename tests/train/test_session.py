"""What a session makes of its configuration: the plan of an epoch, and how its images are loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from ray_det.bench.alone import open_alone
from ray_det.config import TrainJobConfig
from ray_det.data.collate import Shard, load
from ray_det.data.headers import map_in_threads
from ray_det.data.plan import resized, round_up
from ray_det.report.metrics_file import read_records
from ray_det.train import loop
from ray_det.train.checkpoint import Checkpoint
from ray_det.train.opening import open_session
from ray_det.train.session import Session
from ray_det.train.snapshot import Snapshot
from ray_det.train.start import begin
from ray_det.train.validation import end_epoch
from ray_det.train.work import evaluation_of
from ray_det.types import MicroBatch
from tests.models.zoo import FAMILIES


@pytest.fixture(scope="module")
def session(small_coco: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Of a data set whose first images cannot be read, with everything on."""
    folder = tmp_path_factory.mktemp("session")
    shutil.copytree(small_coco["train"].parent, folder / "coco")
    for name in ("train_0001.jpg", "train_0004.jpg"):
        (folder / "coco" / "images" / name).write_bytes(b"no image")
    config = TrainJobConfig.model_validate(
        {
            "storage": str(folder / "runs"),
            "data": {"train": str(folder / "coco" / "train.json"), "image_size": 640}
            | {"sampling": "repeat_factor", "repeat_threshold": 1},
            "augment": {"mosaic": 0.5, "mixup": 0.2, "copy_paste": 0.1, "iou_crop": 0.3, "close_mosaic": 3},
            "model": FAMILIES["fcos"].model_dump(),
            "train": {"epochs": 8, "global_batch_size": 4},
            "wandb": {"mode": "disabled"},
        }
    )
    return open_alone(begin(config, 0.0, lambda text: None, map_in_threads), 1, lambda work: iter(load(work)))


def test_canvases_are_those_of_the_images_that_are_on_them(session):
    """Also where images before them are not trained on."""
    table, plan = session.job.manifests["train"].table, session.work.plan(0)
    assert not table["trainable"][0].as_py() and set(np.unique(plan.rows_SMB)) == set(np.delete(np.arange(16), [0, 3]))
    for rows, canvas in zip(plan.rows_SMB.reshape(plan.steps, -1), plan.canvas_S2, strict=True):
        heights, widths = (table[name].to_numpy()[rows] for name in ("height", "width"))
        expected = round_up(resized(heights, widths, 640, "longest").max(axis=0), session.detector.size_divisor)
        assert np.array_equal(canvas, expected)


def test_the_configured_sampling_is_the_plans(session):
    work = session.work
    images = work._sampler.images
    assert len(work._sampler.factors_N) == 14 < images - 4 and work._sampler is work._sampler
    assert {work.plan(epoch).steps for epoch in range(5)} == {-(-images // 4)}


def test_the_images_of_an_evaluation_are_waited_for_as_long_as_those_of_training(session):
    workers = session.config.workers.model_copy(update={"storage_timeout_s": 7.0})
    config = session.config.model_copy(update={"workers": workers})
    assert evaluation_of(session.job.manifests["train"], config, divisor=32).spec.patience_s == 7


def test_the_last_epochs_are_loaded_without_composing(session):
    for epoch in range(8):
        spec = session.work.epoch(epoch).shard.spec
        assert spec.augment is not None and spec.augment.flip == 0.5
        shares = [getattr(spec.augment, name) for name in ("mosaic", "mixup", "copy_paste", "iou_crop")]
        assert shares == ([0.5, 0.2, 0.1, 0.3] if epoch < 5 else [0, 0, 0, 0])
    assert session.work.evaluation("train").spec.augment is None


@pytest.mark.parametrize("resize, dynamic", [("longest", True), ("square", None)])
def test_what_is_compiled_knows_whether_canvases_differ(resize, dynamic, small_coco, tmp_path, monkeypatch):
    """All but the compilation, which takes minutes. The moving average is evaluated, in other shapes, and is not."""
    asked = {
        "storage": str(tmp_path / "runs"),
        "data": {"train": str(small_coco["train"]), "image_size": 640, "resize": resize},
        "model": FAMILIES["fcos"].model_dump(),
        "optim": {"ema_decay": 0.99},
        "train": {"epochs": 1, "global_batch_size": 2, "compile": True},
        "wandb": {"mode": "disabled"},
    }
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    job = begin(TrainJobConfig.model_validate(asked), 0.0, lambda text: None, map_in_threads)
    opened = open_alone(job, 1, lambda work: iter(load(work)))
    assert compiled == [(module, {"dynamic": dynamic}) for module in opened.detector.networks]


@pytest.mark.parametrize("steps", [4, 1])
def test_what_follows_an_epochs_steps_begins_to_be_loaded_before_the_last(steps, small_coco, tmp_path, monkeypatch):
    """The very shards that are streamed then: the validation, where there is one, and the next epoch. And not before
    the epoch itself is streamed, which would forget what was expected of it.
    """
    config = TrainJobConfig.model_validate(
        {
            "storage": str(tmp_path),
            "data": {"train": str(small_coco["train"]), "val": str(small_coco["val"]), "image_size": 64},
            "model": FAMILIES["fcos"].model_dump(),
            "train": {"epochs": 3, "global_batch_size": 16 // steps, "micro_batch_size": 2},
            "eval": {"every_epochs": 2},
            "wandb": {"mode": "disabled"},
        }
    )
    ahead: list[int] = []  # of a GPU; here none is, on whatever this runs
    monkeypatch.setattr(loop, "pinned", lambda batches, device, most: ahead.append(most) or batches)
    session = open_alone(begin(config, 0.0, lambda text: None, map_in_threads), 1, lambda shard: iter(()))
    events: list[tuple[str, Any]] = []
    at: list[int] = []  # steps that were done when something was expected

    def stream(shard: Shard) -> Iterator[MicroBatch]:
        events.append(("stream", shard))
        for batch in load(shard):
            if shard.spec.augment is not None:
                events.append(("loaded", batch.step))
            yield batch

    def expect(shards: Sequence[Shard]) -> None:
        events.append(("expect", shards))
        at.append(session.state.step)

    session.runtime = replace(session.runtime, stream=stream, expect=expect)
    for _ in range(3):
        loop._train_epoch(session)
        end_epoch(session)
    session.writer.close()
    assert [what for what, _ in events if what != "loaded"] == ["stream", "expect"] + ["stream", "expect", "stream"] * 2
    streamed = [shard for what, shard in events if what == "stream"]
    second, validation, third, last_validation = streamed[1:]
    expected = [shards for what, shards in events if what == "expect"]
    for found, wanted in zip(expected, ([second], [validation, third], [last_validation]), strict=True):
        assert len(found) == len(wanted) and all(one is other for one, other in zip(found, wanted, strict=True))
    before = [events[i - 1] for i, (what, _) in enumerate(events) if what == "expect"]
    assert ahead == [8 // steps] * 3, "as many as a step takes"
    assert before == [("loaded", steps - 1)] * 3 and at == [steps - 1] * 3


def test_a_steps_record_is_written_within_the_next_and_none_is_lost(small_coco, tmp_path, monkeypatch):
    """Before the next batch is asked for it would be time in which a GPU has nothing to do."""
    config = TrainJobConfig.model_validate(
        {
            "storage": str(tmp_path),
            "data": {"train": str(small_coco["train"]), "image_size": 64},
            "model": FAMILIES["fcos"].model_dump(),
            "train": {"epochs": 2, "global_batch_size": 4},
            "wandb": {"mode": "disabled"},
        }
    )
    monkeypatch.setattr(loop, "pinned", lambda batches, *more: batches)  # not ahead, on whatever this runs
    job = begin(config, 0.0, lambda text: None, map_in_threads)
    written: list[int] = []  # records, when a batch is asked for
    before_own: list[int] = []  # and when a step's own is about to be made
    kept: list[int] = []  # as checkpoints know them

    def stream(shard: Shard) -> Iterator[MicroBatch]:
        for batch in load(shard):
            written.append(len(path.read_text().splitlines()))
            if len(written) == 7:
                raise OSError("the third of the second epoch")
            yield batch

    def commit(staged: Path, name: str) -> None:
        kept.append(json.loads((staged / "state.json").read_text())["state"]["log_lines"])

    session = open_alone(job, 1, stream, commit)
    path = session.runtime.folder / "metrics.jsonl"
    publish = lambda numbers: before_own.append(len(path.read_text().splitlines()))  # noqa: E731
    session.runtime = replace(session.runtime, publish=publish)
    with pytest.raises(OSError, match="the third"):
        loop._run(session)
    assert written == [0, 0, 1, 2, 5, 5, 6]  # the first epoch is kept with its own record
    assert before_own == [0, 1, 2, 3, 5, 6] and kept == [4]
    assert [record["global_step"] for record in read_records(path)] == [1, 2, 3, 4, 4, 5, 6]


def test_a_session_that_goes_back_tells_the_lower_rate(session, tmp_path):
    """Also before its next step: an epoch's end is told of it, and a sweep sees whether it is as planned."""
    state = replace(session.state, rollbacks=1)
    Snapshot.of(session.detector, session.optimizer, state, session.job.facts).write(tmp_path / "kept")
    again = open_session(session.job, session.runtime, Checkpoint.open(tmp_path / "kept"), rollbacks=3)
    before, after = (opened.optimizer.param_groups[0]["lr"] for opened in (session, again))
    assert after == pytest.approx(before * session.config.train.rollback_lr_factor**2)
