"""How many detectors predict side by side, and on what."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import ray

from ray_det.cluster import cores, fitting, start_ray
from ray_det.config import WorkersConfig
from ray_det.types import UserError


@dataclass(frozen=True)
class Pool:
    """Equal actors, each with a detector."""

    actors: int
    gpu: bool  # whether each has a GPU
    cpus: float  # that Ray counts for each
    threads: int  # of each, to decode and for torch


def find_pool(workers: WorkersConfig, shards: int) -> Pool:
    """Start or join Ray, and take as many actors as are asked for, or as there is room and work for.

    Raises:
        UserError: there is no room for the least of them after `start_timeout_s`.
    """
    start_ray(workers)
    deadline = time.monotonic() + workers.start_timeout_s
    local = not os.environ.get("RAY_ADDRESS")
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if local:  # where Ray counts more CPUs than there are
            nodes = [node | {"CPU": float(cores())} for node in nodes]
        gpu = workers.use_gpu
        if gpu is None:
            gpu = fitting(nodes, workers.cpus, gpus=1) >= workers.least
        room = fitting(nodes, workers.cpus, gpus=int(gpu))
        if room >= workers.least or local or time.monotonic() > deadline:
            break
        time.sleep(1)
    if room < workers.least:
        need = f"{workers.cpus:g} CPUs" + (" and a GPU" if gpu else "")
        have = ", ".join(f"{n.get('CPU', 0):g} CPUs {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise UserError(f"no room for {workers.least} workers with {need} each: the cluster's nodes have {have}")
    actors = min(room, workers.most, shards)
    hosts = [node for node in nodes if fitting([node], workers.cpus, gpus=int(gpu))]
    per_host = -(-actors // len(hosts))
    threads = workers.threads or max(1, int(max(node["CPU"] for node in hosts) // per_host))
    return Pool(actors, gpu, workers.cpus, threads)
