"""The training loop in plain processes: `python -m tests.train.runner SPEC.json RANK`, or `run_alone(spec)` here.

A spec: config (of a `TrainJobConfig`), world, checkpoint (folder or null), frozen_norms (all batch norms). Every
checkpoint that the loop commits is kept under `<storage>/<name>/kept/`, what it tells the driver in `messages.txt`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import BatchNorm2d, Module
from torch.nn.modules.module import register_module_forward_pre_hook

from ray_det.config import TrainJobConfig
from ray_det.data.collate import Shard, load
from ray_det.data.headers import map_in_threads
from ray_det.train import loop
from ray_det.train.checkpoint import Checkpoint
from ray_det.train.evaluation import Evaluated, evaluate_checkpoint
from ray_det.train.job import Job
from ray_det.train.session import Runtime
from ray_det.train.start import begin, claim
from ray_det.train.step import Asked
from tests.ranks import process_group, run_ranks


def run_alone(spec: dict[str, Any], rank: int = 0) -> Path:
    """Run one rank; -> the run folder."""
    config = TrainJobConfig.model_validate(spec["config"])
    for _ in range(rank):  # one after the other: they write the same files
        dist.barrier()
    job = begin(config, 0.0, lambda text: None, map_in_threads)
    claim(job)
    for _ in range(rank, spec["world"] if spec["world"] > 1 else 0):
        dist.barrier()
    folder = job.run.local
    assert folder is not None
    group = dist.group.WORLD if spec["world"] > 1 else None
    runtime = Runtime(
        rank=rank,
        world=spec["world"],
        device=torch.device("cpu"),
        group=group,
        threads=1,
        stream=_stream,
        newest=partial(_newest, folder, spec),
        commit=partial(_keep, folder),
        notify=partial(_tell, folder),
        asked=Asked,
        preempted=lambda: False,
        at=lambda phase, step, epoch: None,
        publish=lambda numbers: None,
        folder=folder,
        kept=lambda name: nullcontext(_kept(folder, spec, name)),
        validate=partial(_validate, folder, spec, job) if config.eval.background else None,
    )
    with frozen_norms(spec.get("frozen_norms", False)):
        loop.run(job, runtime)
    return folder


def run_world(spec: dict[str, Any], scratch: Path, timeout_s: float = 240) -> Path:
    """Run `world` processes to their end; -> the run folder."""
    file = scratch / "spec.json"
    file.write_text(json.dumps(spec))
    run_ranks("tests.train.runner", file, spec["world"], timeout_s)
    return Path(spec["config"]["storage"]) / spec["config"]["name"]


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what measures time."""
    timing = ("train/images_per_s", "train/data_wait_share")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def by_step(known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records in the order of their steps, whenever they were logged."""
    kinds = ("train/batch_loss", "train/epoch_avg_loss", "test/AP")
    return sorted(known, key=lambda record: (record["global_step"], [kind in record for kind in kinds].index(True)))


def _stream(work: Shard):
    for i in range(len(work.assignment)):
        yield from load(work, i, i + 1)


def _kept(folder: Path, spec: dict[str, Any], name: str) -> Path:
    """A checkpoint of this run, or of the one that it goes on with."""
    own = folder / "kept" / name
    return own if own.exists() else Path(spec["checkpoint"]).with_name(name)


def _validate(folder: Path, spec: dict[str, Any], job: Job, name: str) -> Future[Evaluated | None]:
    """At once, in this process."""
    future = Future[Evaluated | None]()
    cpu, checkpoint = torch.device("cpu"), _kept(folder, spec, name)
    future.set_result(evaluate_checkpoint(checkpoint, job.config, job.manifests["val"], _stream, cpu))
    return future


@contextmanager
def _newest(folder: Path, spec: dict[str, Any], before: int | None) -> Iterator[Checkpoint | None]:
    """The last one that was kept here, or else the one to start from."""
    kept = sorted((folder / "kept").glob("*"))
    while kept and before is not None and Checkpoint.open(kept[-1]).state.global_step >= before:
        kept.pop()
    path = kept[-1] if kept else spec.get("checkpoint")
    yield Checkpoint.open(Path(path)) if path else None


def _tell(folder: Path, update: dict[str, Any]) -> None:
    if "message" in update:
        with (folder / "messages.txt").open("a") as file:
            file.write(update["message"] + "\n")


def _keep(folder: Path, staged: Path, name: str) -> None:
    shutil.rmtree(folder / "kept" / name, ignore_errors=True)
    shutil.copytree(staged, folder / "kept" / name, copy_function=os.link)


@contextmanager
def frozen_norms(frozen: bool) -> Iterator[None]:
    """Every batch norm of this process normalises with the statistics it was made or loaded with."""

    def freeze(module: Module, _: Any) -> None:
        if isinstance(module, BatchNorm2d):
            module.eval()

    hook = register_module_forward_pre_hook(freeze) if frozen else None
    try:
        yield
    finally:
        if hook:
            hook.remove()


def main(path: Path, rank: int) -> None:
    spec = json.loads(path.read_text())
    with process_group(path.with_name("store"), rank, spec["world"]):
        run_alone(spec, rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
