"""How long training waits for a checkpoint: written by a thread while training goes on, or before it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from pydantic import Field

from ray_det.bench.alone import open_alone
from ray_det.bench.measure import Arm, Bench, Figure, compare
from ray_det.config import ModelConfig, TrainJobConfig
from ray_det.data.collate import load
from ray_det.data.headers import map_in_threads
from ray_det.train.session import Session
from ray_det.train.start import begin
from ray_det.train.step import train_step
from ray_det.train.store import keep
from ray_det.types import MicroBatch, UserError


class SmallModel(ModelConfig):
    """With defaults of its own: those of a section count where one of its fields is named, and in --help."""

    name: str = Field(default="torchvision/retinanet_resnet18_fpn", description="as jobs/train.py takes it")
    weights: str = Field(default="none", description="as jobs/train.py takes it")


class Config(Bench):
    model: SmallModel = SmallModel()
    image_size: Annotated[int, Field(ge=32)] = Field(default=128, description="side of the images, pixels")
    threads: Annotated[int, Field(ge=1)] = Field(default=1, description="torch threads")
    steps: Annotated[int, Field(ge=1)] = Field(default=6, description="steps within which a checkpoint is written")
    storage: str | None = Field(default=None, description="local folder whose disk is measured; default: temporary")


def run(config: Config) -> Iterator[Figure]:
    with _folder(config.storage) as storage:
        session, batches = _prepared(config, storage)
        _steps(session, batches, 1)  # or there is no optimizer state
        weights = sum(p.nbytes for p in session.detector.parameters())
        more = {"model": config.model.name, "weights_mb": weights / 1e6, "checkpoint_mb": 3 * weights / 1e6}

        def arms(measure: Callable[[Session, list[MicroBatch], int], float]) -> tuple[Arm, Arm]:
            def arm(name: str, asynchronous: bool) -> Arm:
                train = session.config.train.model_copy(update={"async_checkpoints": asynchronous})
                asked = session.config.model_copy(update={"train": train})

                def once() -> float:
                    session.job = replace(session.job, config=asked)
                    return measure(session, batches, config.steps)

                return Arm(name, once, {"threads": config.threads, "steps": config.steps})

            return arm("while training goes on", True), arm("before the next step", False)

        yield compare(
            "train stall of a checkpoint", "s", *arms(_held_s), repeats=config.repeats, target="<= 0.3x", more=more
        )
        yield compare("a checkpoint and steps after it", "s", *arms(_all_s), repeats=config.repeats, more=more)
        session.writer.close()


@contextmanager
def _folder(storage: str | None) -> Iterator[Path]:
    """A new one, in `storage` where that is given, which goes at the end."""
    try:
        if storage:
            Path(storage).mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix="bench-", dir=storage)
    except OSError as error:
        raise UserError(f"--storage {storage}: {error.strerror}") from None
    with folder as path:
        yield Path(path)


def _held_s(session: Session, batches: list[MicroBatch], steps: int) -> float:
    """Until the next step may begin."""
    began = time.perf_counter()
    session.save()
    held = time.perf_counter() - began
    session.settle()
    return held


def _all_s(session: Session, batches: list[MicroBatch], steps: int) -> float:
    """Until it is kept and the steps are done, which its writing may slow down."""
    began = time.perf_counter()
    session.save()
    _steps(session, batches, steps)
    session.settle()
    return time.perf_counter() - began


def _steps(session: Session, batches: list[MicroBatch], steps: int) -> None:
    for step in range(steps):
        micro, device = [batches[step % len(batches)]], session.runtime.device
        train_step(session.model, session.optimizer, micro, device=device, clip_norm=1, seed=0, global_step=step)


def _prepared(config: Config, storage: Path) -> tuple[Session, list[MicroBatch]]:
    """A run on the embedded data, and ready batches of its first epoch."""
    asked = TrainJobConfig.model_validate(
        {
            "name": "bench",
            "storage": str(storage),
            "model": config.model.model_dump(),
            "data": {"image_size": config.image_size},
            "train": {"global_batch_size": 2},
            "wandb": {"mode": "disabled"},
        }
    )
    job = begin(asked, time.time(), lambda text: None, map_in_threads)
    session = open_alone(
        job, config.threads, lambda work: iter(load(work)), commit=lambda staged, name: keep(job.run, staged, name)
    )
    return session, load(session.work.epoch(0).shard, 0, 4)
