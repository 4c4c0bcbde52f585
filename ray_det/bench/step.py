"""One optimizer step on batches that are ready: the training loop, the optimizer's tail, precision, several workers.

Batches are drawn pictures, decoded beforehand. Everything runs on the GPU where there is one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ray_det.bench.alone import open_alone, seconds
from ray_det.bench.measure import Arm, Bench, Figure, compare
from ray_det.config import ModelConfig, OptimConfig, TrainJobConfig
from ray_det.data import embedded
from ray_det.data.collate import Shard, load
from ray_det.data.headers import map_in_threads
from ray_det.models.build import build_detector
from ray_det.models.compute import use_bf16
from ray_det.models.detector import Detector, to_device
from ray_det.train.ema import Ema
from ray_det.train.loop import train_steps
from ray_det.train.optim import build_optimizer
from ray_det.train.session import Session
from ray_det.train.start import begin
from ray_det.train.step import gradient_norm, update
from ray_det.types import ClassList, MicroBatch


class SmallModel(ModelConfig):
    """With defaults of its own: those of a section count where one of its fields is named, and in --help."""

    name: str = Field(default="torchvision/fcos_mobilenet_v3_small_fpn", description="as jobs/train.py takes it")
    weights: str = Field(default="none", description="as jobs/train.py takes it")
    fpn_channels: Annotated[int, Field(ge=8)] = Field(default=64, description="as jobs/train.py takes it")


class Config(Bench):
    figures: tuple[Literal["loop", "tail", "precision", "ranks", "criterion"], ...] = Field(
        default=("loop", "tail", "precision", "ranks", "criterion"), description="what is measured"
    )
    model: SmallModel = SmallModel()
    image_size: Annotated[int, Field(ge=32)] = Field(default=320, description="longest side, pixels")
    batch_size: Annotated[int, Field(ge=1)] = Field(default=8, description="images per step")
    steps: Annotated[int, Field(ge=1)] = Field(default=10, description="steps per repetition")
    threads: Annotated[int, Field(ge=1)] = Field(
        default_factory=torch.get_num_threads, description="torch threads; the workers of `ranks` have one each"
    )
    wandb: Literal["offline", "disabled"] = Field(default="offline", description="whether our loop logs to wandb too")


def run(config: Config) -> Iterator[Figure]:
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as scratch, session(config, Path(scratch)) as (ours, batches):
        if "loop" in config.figures:
            yield _loop(config, ours, batches)
        if "tail" in config.figures:
            yield _tail(config, ours)
        if "precision" in config.figures:
            yield _precision(config, ours, batches)
        if "ranks" in config.figures:
            from ray_det.bench.ranks import weak_scaling

            yield weak_scaling(config.repeats, config.model, ours.job.facts.classes, batches)
    if "criterion" in config.figures:
        from ray_det.bench import criterion

        yield from criterion.figures(config.repeats)


@contextmanager
def session(config: Config, scratch: Path) -> Iterator[tuple[Session, list[MicroBatch]]]:
    """A training run's session in this process, and the batches of its epochs."""
    data = embedded.generate(scratch / "data", train=config.steps * config.batch_size, val=1, test=1)
    asked = {
        "storage": str(scratch),
        "data": {"train": str(data["train"]), "image_size": config.image_size, "last_batch": "drop"},
        "model": config.model.model_dump(),
        "train": {"epochs": 1000, "global_batch_size": config.batch_size, "precision": "fp32"},
        "wandb": {"mode": config.wandb},
    }
    batches: list[MicroBatch] = []

    def stream(work: Shard) -> Iterator[MicroBatch]:
        if not batches:
            batches.extend(next(iter(load(work, i, i + 1))) for i in range(len(work.assignment)))
        return iter(batches)

    job = begin(TrainJobConfig.model_validate(asked), time.time(), lambda text: None, map_in_threads)
    opened = open_alone(job, config.threads, stream)
    try:
        train_steps(opened, opened.work.epoch(0))  # loads the batches
        yield opened, batches
    finally:
        if opened.tracker:
            opened.tracker.finish()


def _loop(config: Config, ours: Session, batches: list[MicroBatch]) -> Figure:
    """Everything that the loop does for a step against the least that trains."""
    device, epoch = ours.runtime.device, ours.work.epoch(0)
    detector, optimizer = fresh(ours)
    count = len(batches)

    def our_loop() -> None:
        ours.state = ours.state.next_epoch()
        train_steps(ours, epoch)

    def bare_loop() -> None:
        for micro in batches:
            bare_step(detector, optimizer, micro)

    shared = {"model": config.model.name, "image_size": config.image_size, "batch_size": config.batch_size}
    shared |= {"steps": count, "optimizer": "AdamW(fused=True)", "precision": "fp32", "deterministic": "on CPU"}
    our_settings = shared | {"clip_norm": 1.0, "logging": f"metrics.jsonl, wandb {config.wandb}"}
    return compare(
        "step, with all of the loop",
        "s",
        Arm("ray_det", partial(seconds, our_loop, device, count), our_settings),
        Arm("bare loop", partial(seconds, bare_loop, device, count), shared | {"clip_norm": None, "logging": None}),
        repeats=config.repeats,
        target="<= 1.03x",
    )


def _tail(config: Config, ours: Session) -> Figure:
    """Clip, AdamW and moving average, as the step does them and in plain loops."""
    device = ours.runtime.device
    detector, optimizer = fresh(ours)
    ema = Ema(detector, 0.9999, 2000)
    plain = fresh(ours)[0]
    params = [p for p in plain.parameters() if p.requires_grad]
    plain_optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=1e-4, foreach=False, fused=False)
    averages: list[Tensor] = [p.detach().clone() for p in params]

    def our_tail() -> None:
        norm = gradient_norm(optimizer)
        update(optimizer, ema, 1.0, norm, norm.item())

    def plain_tail() -> None:
        nn.utils.clip_grad_norm_(params, 1.0, foreach=False)
        plain_optimizer.step()
        with torch.no_grad():
            for average, p in zip(averages, params, strict=True):
                average.mul_(0.9999).add_(p, alpha=1 - 0.9999)

    def timed(tail: Callable[[], None], model: nn.Module) -> float:
        total = 0.0
        for step in range(20):
            for i, p in enumerate(model.parameters()):
                if p.requires_grad:
                    p.grad = torch.full_like(p, 1e-2 * (1 + (step + i) % 3))
            total += seconds(tail, device)
        return total / 20 * 1000

    shared = {"model": config.model.name, "tensors": len(params), "parameters": sum(p.numel() for p in params)}
    return compare(
        "clip, AdamW and EMA",
        "ms",
        Arm("foreach and fused", partial(timed, our_tail, detector), shared),
        Arm("loops", partial(timed, plain_tail, plain), shared | {"foreach": False, "fused": False}),
        repeats=config.repeats,
        target="<= 0.667x",
    )


def _precision(config: Config, ours: Session, batches: list[MicroBatch]) -> Figure:
    """bfloat16 autocast, as the step does it, against float32; batches are channels-last in both."""
    device = ours.runtime.device
    lower, exact = fresh(ours), fresh(ours)

    def loop(detector: Detector, optimizer: torch.optim.Optimizer, bf16: bool) -> None:
        for micro in batches:
            bare_step(detector, optimizer, micro, bf16=bf16)

    shared = {"model": config.model.name, "image_size": config.image_size, "batch_size": config.batch_size}
    fast = use_bf16("auto", device)
    return compare(
        "step in bf16",
        "s",
        Arm("bf16", partial(seconds, partial(loop, *lower, True), device, len(batches)), shared),
        Arm("fp32", partial(seconds, partial(loop, *exact, False), device, len(batches)), shared),
        repeats=config.repeats,
        target="<= 0.714x" if fast else None,  # where `train.precision: auto` takes it
        more={"taken by train.precision: auto": fast},
    )


def fresh(ours: Session) -> tuple[Detector, torch.optim.Optimizer]:
    """Another detector and optimizer of the session's kind."""
    return build(ours.config.model, ours.job.facts.classes, ours.config.optim, ours.runtime.device)


def build(
    model: ModelConfig, classes: ClassList, optim: OptimConfig, device: torch.device
) -> tuple[Detector, torch.optim.Optimizer]:
    """A detector that trains, always from the same weights, and its optimizer."""
    torch.manual_seed(0)
    detector, _ = build_detector(model, classes)
    detector.to(device).train()
    return detector, build_optimizer(optim, detector)


def bare_step(model: nn.Module, optimizer: torch.optim.Optimizer, micro: MicroBatch, *, bf16: bool = False) -> None:
    device = next(model.parameters()).device
    optimizer.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = model(to_device(micro, device))["loss"]
    loss.backward()
    optimizer.step()
