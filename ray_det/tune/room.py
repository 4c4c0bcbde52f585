"""How many trials a cluster holds at once, so that neither they nor their loaders wait for one another."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import ray

from ray_det.cluster import Room, cores, fitting, start_ray
from ray_det.config import WorkersConfig
from ray_det.types import UserError

Node = Mapping[str, float]


def trials_at_once(nodes: Sequence[Node], workers: WorkersConfig, *, gpu: bool) -> int:
    """The most trials of which all workers fit, and a whole CPU for the loaders of each.

    Trials beyond it would hold some of their workers and wait for others, or hold all of them and wait for data.

    Args:
        nodes: CPU and GPU of each.
        gpu: whether a worker takes one.
    """
    # Of nodes with parts of CPUs, all but one may have a part left that is of no use to a loader.
    parts = any(value % 1 for value in (workers.cpus, *(node.get("CPU", 0) for node in nodes)))
    cpus = sum(node.get("CPU", 0) for node in nodes) - (len(nodes) - 1 if parts else 0)
    trials = fitting(nodes, workers.cpus, gpus=int(gpu)) // workers.least
    while trials and cpus - trials * workers.least * workers.cpus < trials:
        trials -= 1
    return trials


def start_for(workers: WorkersConfig, most: int) -> int:
    """Connect to Ray, or start it here, with room for up to `most` trials -> how many it is for."""
    if not os.environ.get("RAY_ADDRESS"):  # this machine: trials share its cores, and so do their loaders beside them
        most = max(1, min(most, cores(), int(cores() // (workers.least * workers.cpus))))
    start_ray(workers.model_copy(update={"num": most * workers.least}))
    return most


def make_room(workers: WorkersConfig, most: int) -> tuple[int, Room]:
    """Ray with room for up to `most` trials -> (trials at once, what each of their workers gets).

    Raises:
        UserError: not even one trial fits: at once, for who plans a sweep has the cluster.
    """
    if workers.least < workers.most:
        raise UserError(f"--workers.num {workers.num}: a sweep's trials have a number of workers each, not a range")
    most = start_for(workers, most)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpu = workers.use_gpu
    if gpu is None:
        gpu = fitting(nodes, workers.cpus, gpus=1) >= workers.least
    trials = min(most, trials_at_once(nodes, workers, gpu=gpu))
    if not trials:
        have = ", ".join(f"{node.get('CPU', 0):g} CPUs {node.get('GPU', 0):g} GPUs" for node in nodes)
        need = f"{workers.least} workers with {workers.cpus:g} CPUs" + (" and a GPU" if gpu else "")
        raise UserError(
            f"no room for a trial: {need} each, and a CPU for loaders; the cluster's nodes have {have} "
            "(see --workers.num and --workers.cpus)"
        )
    taken = trials * workers.least
    share = (sum(node.get("CPU", 0) for node in nodes) - taken * workers.cpus) / taken
    return trials, Room(gpu, share, workers.threads or max(1, int(share)), len(nodes) > 1)
