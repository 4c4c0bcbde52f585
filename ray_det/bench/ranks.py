"""Weak scaling on one machine: two workers of one thread each, in DistributedDataParallel, against one."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_det.bench.measure import Arm, Figure, compare
from ray_det.config import ModelConfig, OptimConfig
from ray_det.models.build import build_detector
from ray_det.train.optim import build_optimizer
from ray_det.train.step import train_step
from ray_det.types import ClassList, MicroBatch

WORLD = 2


def weak_scaling(repeats: int, model: ModelConfig, classes: ClassList, batches: list[MicroBatch]) -> Figure:
    """Images/s per worker of two workers, each with batches of the size that the single one has."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        lines: dict[int, list[Connection]] = {1: [], WORLD: []}
        context = multiprocessing.get_context("spawn")
        for world, rank in ((1, 0), *((WORLD, rank) for rank in range(WORLD))):
            line, other = context.Pipe()
            about = rank, world, Path(scratch) / "store", other, model, classes, batches
            process = context.Process(target=_rank, args=about, daemon=True)
            process.start()
            other.close()
            stack.callback(process.join)
            stack.callback(line.close)
            lines[world].append(line)

        def rate(world: int) -> float:
            for line in lines[world]:
                line.send("go")
            return len(batches) * len(batches[0].image_ids_B) / max(line.recv() for line in lines[world])

        settings = {"model": model.name, "batch_size": len(batches[0].image_ids_B), "threads per worker": 1}
        return compare(
            "weak scaling, images/s per worker",
            "images/s",
            Arm("2 workers", lambda: rate(WORLD), settings | {"backend": "gloo"}),
            Arm("1 worker", lambda: rate(1), settings),
            repeats=repeats,
            target=">= 0.85x",
        )


def _rank(
    rank: int,
    world: int,
    store: Path,
    line: Connection,
    model: ModelConfig,
    classes: ClassList,
    batches: list[MicroBatch],
) -> None:
    """One worker: whenever it is told to go, seconds of all batches."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    detector: nn.Module = build_detector(model, classes)[0].train()
    optimizer = build_optimizer(OptimConfig(), detector)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        detector = DistributedDataParallel(detector, gradient_as_bucket_view=True)
    while True:
        try:
            line.recv()
        except EOFError:
            break
        begin, device = time.perf_counter(), torch.device("cpu")
        for step, micro in enumerate(batches):
            train_step(detector, optimizer, [micro], device=device, clip_norm=1.0, seed=rank, global_step=step)
        line.send(time.perf_counter() - begin)
    if world > 1:
        dist.destroy_process_group()
