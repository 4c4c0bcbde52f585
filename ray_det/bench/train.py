"""Images/s from files to weights: runs of jobs/train.py against a Hugging Face `Trainer` and torchvision's own loop.

All arms train the same network from the same random distribution on the same photographs, resized to the same longest
side, with AdamW, a flip and no other augmentation. With `--memory_epochs 50 --steps 8 --skipped 1 --image_size 160` it
weighs the processes of a run instead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from pydantic import Field

from ray_det.bench import photos
from ray_det.bench.measure import Arm, Bench, Figure, compare
from ray_det.bench.task import MODELS, Task, run_peer, run_process, subset
from ray_det.data.prepare import prepare
from ray_det.report.metrics_file import read_records
from ray_det.types import UserError

JOB = Path(__file__).parents[2] / "jobs" / "train.py"
TARGET, GPU_TARGET = ">= 1.3x", ">= 1.5x"


class Config(Bench):
    repeats: Annotated[int, Field(ge=1)] = Field(
        default=3, description="repetitions of each arm: whole runs, no warm-up"
    )
    models: tuple[Literal["dfine", "fcos", "fcos_resnet50", "fasterrcnn"], ...] = Field(
        default=("dfine", "fcos", "fasterrcnn"),
        description="D-FINE-S; FCOS on MobileNetV2 and, torchvision's own, on ResNet-50; Faster R-CNN on MobileNetV2",
    )
    data: str | None = Field(
        default=None, description="COCO JSON to train on; default: drawn photographs of COCO's sizes"
    )
    images: str | None = Field(default=None, description="root of its `file_name`s; default: found beside it")
    cache: str = Field(default="./runs/.cache/bench", description="folder that keeps the drawn photographs")
    image_size: Annotated[int, Field(ge=32)] = Field(default=320, description="longest side, pixels")
    batch_size: Annotated[int, Field(ge=1)] = Field(default=4, description="images per step")
    steps: Annotated[int, Field(ge=2)] = Field(default=48, description="optimizer steps of each run, one epoch")
    skipped: Annotated[int, Field(ge=1)] = Field(default=8, description="first steps of each run that are not counted")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="of all arms, as --train.precision")
    threads: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="torch threads of the process that trains; default: the cores"
    )
    loaders: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="processes of the peers' DataLoader; default: the cores, as ray_det may use"
    )
    memory_epochs: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="epochs of one run (FCOS, with validation) whose processes are weighed, at least 10; 0: rates",
    )


def run(config: Config) -> Iterator[Figure]:
    """Raises:
    UserError: a package of the peers is missing, or there are too few images.
    """
    if config.skipped >= config.steps:
        raise UserError(f"--skipped {config.skipped} leaves none of --steps {config.steps}")
    if "dfine" in config.models and not config.memory_epochs:
        require("accelerate")
    data, root, classes = _data(config)
    with TemporaryDirectory(prefix="ray_det_") as storage:
        if config.memory_epochs:
            from ray_det.bench.memory import weigh

            task = _task(config, "fcos", data, root, classes)
            epochs = {"train.epochs": config.memory_epochs, "data.val": str(data)}
            yield from weigh(command(task, Path(storage), epochs), task, config.memory_epochs)
            return
        for name in config.models:
            yield _compare(_task(config, name, data, root, classes), config.repeats, Path(storage))


def require(package: str) -> None:
    """Raises:
    UserError: a package that only benchmarks need is not there, with the command that brings it.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"this benchmark needs {package}: uv sync, or pip install {package}")


def _data(config: Config) -> tuple[Path, str, int]:
    """(the COCO JSON that all arms read, the root of its file names, number of classes)"""
    cache, images = Path(config.cache).resolve(), config.steps * config.batch_size
    source = config.data or str(photos.draw(cache / f"photos_{images}", photos.coco_sizes(images)))
    manifest, _ = prepare(source, config.images, cache / "manifests")
    if "://" in manifest.root:
        raise UserError(f"--data {source}: the peers read local files only, these are at {manifest.root}")
    return subset(manifest, images, cache / "subsets"), manifest.root, len(manifest.classes)


def _task(config: Config, name: str, data: Path, root: str, classes: int) -> Task:
    import torch

    from ray_det.models.compute import use_bf16

    cores = len(os.sched_getaffinity(0))
    bf16 = use_bf16(config.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Task(
        data=str(data),
        root=root,
        classes=classes,
        model=MODELS[name],
        threads=config.threads or cores,
        loaders=config.loaders or cores,
        precision="bf16" if bf16 else "fp32",
        **{name: getattr(config, name) for name in ("image_size", "batch_size", "steps", "skipped")},
    )


def _compare(task: Task, repeats: int, storage: Path) -> Figure:
    if task.model.name.startswith("transformers/"):
        from ray_det.bench import peer_trainer as peer
    else:
        from ray_det.bench import peer_reference as peer
    import torch

    ours: dict[str, Any] = {"loop": "jobs/train.py, 1 worker", "batches": "sorted by aspect in windows of 16"}
    return compare(
        f"end to end, {task.model.name}",
        "images/s",
        Arm("ray_det", partial(rate, task, storage), task.settings() | ours),
        Arm(peer.SETTINGS["loop"], partial(run_peer, peer.__name__, task), task.settings() | peer.SETTINGS),
        repeats=repeats,
        warm_up=False,
        target=GPU_TARGET if torch.cuda.is_available() else TARGET,
    )


def rate(task: Task, storage: Path) -> float:
    """A run of `jobs/train.py` -> the images/s of its log, without the first steps."""
    run_process(command(task, storage))
    steps = [r for r in read_records(storage / "run" / "metrics.jsonl") if "train/batch_loss" in r]
    if len(steps) != task.steps:
        raise RuntimeError(f"the run has {len(steps)} steps instead of {task.steps}")
    return 1 / statistics.fmean(1 / r["train/images_per_s"] for r in steps[task.skipped :])


def command(task: Task, storage: Path, changes: dict[str, Any] | None = None) -> list[str]:
    """The job's command line, of one epoch without validation; what it does not name is the recipe's."""
    options: dict[str, Any] = {
        "name": "run",
        "storage": storage,
        "overwrite": "true",
        "seed": task.seed,
        "data.train": task.data,
        "data.images": task.root,
        "data.image_size": task.image_size,
        "augment.flip": task.flip,
        "augment.scale": "1,1",
        "augment.brightness": 0,
        "augment.contrast": 0,
        "augment.saturation": 0,
        "model.name": task.model.name,
        "model.weights": "none",
        "model.fpn_channels": task.model.fpn_channels,
        "model.config": json.dumps(task.model.config),
        "optim.lr": task.lr,
        "optim.weight_decay": task.weight_decay,
        "train.epochs": 1,
        "train.global_batch_size": task.batch_size,
        "train.precision": task.precision,
        "train.deterministic": "false",  # as the peers
        "workers.threads": task.threads,
        "wandb.mode": "disabled",
        **(changes or {}),
    }
    return [sys.executable, str(JOB), *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
