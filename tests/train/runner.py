"""The training loop in plain processes: `python -m tests.train.runner SPEC.json RANK`, or `run_alone(spec)` here.

A spec: config (of a `TrainJobConfig`), world, store (file of the process group), checkpoint (folder or null). Every
checkpoint that the loop commits is kept under `<storage>/<name>/kept/`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ray_det.config import TrainJobConfig
from ray_det.data.collate import Shard, load
from ray_det.data.headers import map_in_threads
from ray_det.train import loop
from ray_det.train.checkpoint import Checkpoint
from ray_det.train.session import Runtime
from ray_det.train.start import begin

ROOT = Path(__file__).parents[2]


def run_alone(spec: dict[str, Any], rank: int = 0) -> Path:
    """Run one rank; -> the run folder."""
    config = TrainJobConfig.model_validate(spec["config"])
    for _ in range(rank):  # one after the other: they write the same files
        dist.barrier()
    job = begin(config, 0.0, lambda text: None, map_in_threads)
    for _ in range(rank, spec["world"] if spec["world"] > 1 else 0):
        dist.barrier()
    folder, checkpoint = job.run.local, spec.get("checkpoint")
    assert folder is not None
    group = dist.group.WORLD if spec["world"] > 1 else None
    runtime = Runtime(
        rank,
        spec["world"],
        torch.device("cpu"),
        group,
        1,
        _stream,
        partial(_keep, folder),
        lambda update: None,
        folder,
    )
    loop.run(job, runtime, Checkpoint.open(Path(checkpoint)) if checkpoint else None)
    return folder


def run_ranks(spec: dict[str, Any], scratch: Path) -> Path:
    """Run `world` processes to their end; -> the run folder."""
    spec = spec | {"store": str(scratch / "store")}
    (scratch / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.runner", str(scratch / "spec.json")]
    world = range(spec["world"])
    processes = [subprocess.Popen([*command, str(r)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for r in world]
    try:
        errors = [p.communicate(timeout=240)[1] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(p.returncode == 0 for p in processes), errors
    return Path(spec["config"]["storage"]) / spec["config"]["name"]


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what measures time."""
    timing = ("train/images_per_s", "train/data_wait_share")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def _stream(work: Shard):
    for i in range(len(work.assignment)):
        yield from load(work, i, i + 1)


def _keep(folder: Path, staged: Path | None, name: str, state: Any) -> None:
    if staged:
        shutil.rmtree(folder / "kept" / name, ignore_errors=True)
        shutil.copytree(staged, folder / "kept" / name)


def main(path: Path, rank: int) -> None:
    spec = json.loads(path.read_text())
    torch.set_num_threads(1)
    if spec["world"] > 1:
        address = f"file://{spec['store']}"
        timeout = timedelta(seconds=120)
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=spec["world"], timeout=timeout)
    run_alone(spec, rank)
    if spec["world"] > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
