"""The Ray cluster under a job: connect to it or start one on this machine, and see what fits on it."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from ray_det.config import WorkersConfig
from ray_det.types import UserError

if TYPE_CHECKING:
    from ray.train import ScalingConfig

ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment as it is
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for this poll
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would come twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's new default, without the warning
}


def start_ray(workers: WorkersConfig) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine with room for workers and loaders."""
    if ray.is_initialized():
        return
    prepare_environment()
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers.num * workers.cpus > cores:
        raise UserError(
            f"no room for {workers.num} workers with {workers.cpus:g} CPUs each: this machine has {cores} CPUs "
            "(see --workers.num and --workers.cpus)"
        )
    # Ray only counts CPUs. Loaders get as many as there are: they sleep while the workers compute, and vice versa.
    ray.init(
        num_cpus=cores + int(-(-workers.num * workers.cpus // 1)),
        include_dashboard=False,  # seconds of start-up and a process that computes beside the training
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def prepare_environment() -> None:
    """Settings that Ray reads when it starts; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of Ray's processes would compile its imports anew


@dataclass(frozen=True)
class Room:
    """What the cluster gives to each worker of a job."""

    gpu: bool  # whether workers get a GPU each
    loader_cpus: float  # that a worker's loaders may use
    threads: int  # torch threads of a worker


def require_room(workers: WorkersConfig) -> Room:
    """What each worker gets, once the cluster has room for all.

    Raises:
        UserError: it has none after `start_timeout_s`, where an autoscaler might have added nodes.
    """
    deadline = time.monotonic() + workers.start_timeout_s
    local = not os.environ.get("RAY_ADDRESS")
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpu = workers.use_gpu
        if gpu is None:
            gpu = _fitting(nodes, workers.cpus, gpus=1) >= workers.num
        fitting = _fitting(nodes, workers.cpus, gpus=int(gpu))
        left = sum(node.get("CPU", 0) for node in nodes) - workers.num * workers.cpus
        if fitting >= workers.num and left >= 1:
            share = left / workers.num
            return Room(gpu, share, workers.threads or max(1, int(share)))
        if local or time.monotonic() > deadline:
            break
        time.sleep(1)
    need = f"{workers.cpus:g} CPUs" + (" and a GPU" if gpu else "")
    have = ", ".join(f"{n.get('CPU', 0):g} CPUs {n.get('GPU', 0):g} GPUs" for n in nodes)
    raise UserError(
        f"no room for {workers.num} workers with {need} each beside a CPU for loaders: the cluster's nodes have {have}"
    )


def scaling(workers: WorkersConfig, room: Room) -> ScalingConfig:
    """Ray Train's words for it."""
    from ray.train import ScalingConfig

    resources = {"CPU": workers.cpus} | ({"GPU": 1} if room.gpu else {})
    return ScalingConfig(num_workers=workers.num, use_gpu=room.gpu, resources_per_worker=resources)


def _fitting(nodes: list[dict[str, float]], cpus: float, gpus: int) -> int:
    """How many workers the nodes hold."""
    total = 0
    for node in nodes:
        by_gpu = node.get("GPU", 0) // gpus if gpus else float("inf")
        total += int(min(node.get("CPU", 0) // cpus, by_gpu))
    return total
