"""The Ray cluster under a job, and what fits on it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from ray_det.config import WorkersConfig
from ray_det.connect import connect, set_limits, start_here
from ray_det.types import UserError

if TYPE_CHECKING:
    from ray.train import ScalingConfig
    from ray.util.placement_group import PlacementGroup


def start_ray(workers: WorkersConfig, beside: int = 0) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine with room for workers and loaders.

    Args:
        beside: processes beside the workers, each as large as one.

    Raises:
        UserError: the cluster cannot be reached, or this machine has no room.
    """
    set_limits(workers)
    if ray.is_initialized() or connect():
        return
    here = cores()
    if workers.least * workers.cpus > here:
        raise UserError(
            f"no room for {workers.least} workers with {workers.cpus:g} CPUs each: this machine has {here} CPUs "
            "(see --workers.num and --workers.cpus)"
        )
    most = min(workers.most, int(here // workers.cpus))
    # Ray only counts CPUs. Loaders get as many as there are: they sleep while the workers compute, and vice versa.
    start_here(here + math.ceil((most + beside) * workers.cpus))


def cores() -> int:
    """CPUs of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Room:
    """What the cluster gives to each worker of a job."""

    gpu: bool  # whether workers get a GPU each
    loader_cpus: float  # that a worker's loaders may use
    threads: int  # torch threads of a worker
    several_nodes: bool  # so that one may be taken away and the run goes on


def require_room(workers: WorkersConfig, beside: int = 0) -> Room:
    """What each worker gets, once the cluster has room for all, or for as many as the run needs.

    Args:
        beside: processes beside the workers, each as large as one.

    Raises:
        UserError: it has none after `start_timeout_s`, where an autoscaler might have added nodes.
    """
    if room := _room(workers, beside):
        return room
    if os.environ.get("RAY_ADDRESS"):
        with _asked_for(workers, beside):
            deadline = time.monotonic() + workers.start_timeout_s
            while time.monotonic() < deadline:
                time.sleep(1)
                if room := _room(workers, beside):
                    return room
    nodes = _alive()
    need = f"{workers.cpus:g} CPUs" + (" and a GPU" if _uses_gpu(workers, nodes) else "")
    who = f"{workers.least} workers" + (" and the validation in the background" if beside else "")
    have = ", ".join(f"{n.get('CPU', 0):g} CPUs {n.get('GPU', 0):g} GPUs" for n in nodes)
    raise UserError(f"no room for {who} with {need} each beside a CPU for loaders: the cluster's nodes have {have}")


def _room(workers: WorkersConfig, beside: int) -> Room | None:
    """What each worker gets of the nodes that there are now; None: there are too few."""
    nodes = _alive()
    gpu = _uses_gpu(workers, nodes)
    room_for = fitting(nodes, workers.cpus, gpus=int(gpu)) - beside
    start = min(room_for, workers.most)
    left = sum(node.get("CPU", 0) for node in nodes) - (start + beside) * workers.cpus
    if room_for < workers.least or left < 1:
        return None
    share = left / start
    return Room(gpu, share, workers.threads or max(1, int(share)), len(nodes) > 1)


def _alive() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _uses_gpu(workers: WorkersConfig, nodes: Sequence[Mapping[str, float]]) -> bool:
    return fitting(nodes, workers.cpus, gpus=1) >= workers.least if workers.use_gpu is None else workers.use_gpu


@contextmanager
def _asked_for(workers: WorkersConfig, beside: int) -> Iterator[None]:
    """An autoscaler adds nodes for what is asked for and has no place: a reservation, which ends with its driver."""
    from ray.util.placement_group import placement_group, remove_placement_group

    each = {"CPU": workers.cpus} | ({"GPU": 1.0} if workers.use_gpu else {})
    place = placement_group([each] * (workers.least + beside) + [{"CPU": 1.0}])
    try:
        yield
    finally:
        remove_placement_group(place)


def place_beside(workers: WorkersConfig, room: Room) -> PlacementGroup:
    """A place for a process as large as a worker, reserved for as long as this driver lives.

    Raises:
        UserError: there is none after `start_timeout_s`.
    """
    from ray.util.placement_group import placement_group

    place = placement_group([resources(workers, room)])
    if not place.wait(workers.start_timeout_s):
        raise UserError(f"no room for {resources(workers, room)} beside the train workers")
    return place


def resources(workers: WorkersConfig, room: Room) -> dict[str, float]:
    """Of a worker, in Ray's words."""
    return {"CPU": workers.cpus} | ({"GPU": 1.0} if room.gpu else {})


def scaling(workers: WorkersConfig, room: Room) -> ScalingConfig:
    """Ray Train's words for it."""
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=workers.num if isinstance(workers.num, int) else (workers.least, workers.most),
        use_gpu=room.gpu,
        resources_per_worker=resources(workers, room),
        elastic_resize_monitor_interval_s=workers.resize_interval_s,
    )


def fitting(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: int) -> int:
    """How many workers the nodes hold."""
    total = 0
    for node in nodes:
        by_gpu = node.get("GPU", 0) // gpus if gpus else float("inf")
        total += int(min(node.get("CPU", 0) // cpus, by_gpu))
    return total
