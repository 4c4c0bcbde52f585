"""Weak scaling on one machine: two workers of one thread each, in DistributedDataParallel, against one."""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
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
        context = multiprocessing.get_context("spawn")
        lines: list[Connection] = []
        for rank in range(WORLD):
            line, other = context.Pipe()
            process = context.Process(
                target=_rank, args=(rank, Path(scratch) / "store", other, model, classes, batches), daemon=True
            )
            process.start()
            other.close()
            stack.callback(process.join)
            lines.append(line)
            stack.callback(line.close)

        def rate(ranks: int) -> float:
            for line in lines[:ranks]:
                line.send(ranks)
            return len(batches) * len(batches[0].image_ids_B) / max(line.recv() for line in lines[:ranks])

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
    rank: int, store: Path, line: Connection, model: ModelConfig, classes: ClassList, batches: list[MicroBatch]
) -> None:
    """One worker: for every number of ranks that comes, seconds of all batches with so many."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    detector = build_detector(model, classes)[0].train()
    twin = copy.deepcopy(detector)
    models = {1: detector, WORLD: DistributedDataParallel(twin, gradient_as_bucket_view=True)}
    optimizers = {1: build_optimizer(OptimConfig(), detector), WORLD: build_optimizer(OptimConfig(), twin)}
    while True:
        try:
            ranks = line.recv()
        except EOFError:
            break
        begin = time.perf_counter()
        for step, micro in enumerate(batches):
            train_step(
                models[ranks],
                optimizers[ranks],
                [micro],
                device=torch.device("cpu"),
                clip_norm=1.0,
                seed=rank,
                global_step=step,
            )
        line.send(time.perf_counter() - begin)
    dist.destroy_process_group()
