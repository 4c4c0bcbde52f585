"""Start a run on Ray: connect or start a cluster, see that the workers fit, run the `TorchTrainer`, show progress."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from ray_det.config import TrainJobConfig, WorkersConfig
from ray_det.report.progress import ProgressPrinter
from ray_det.train.board import start_board
from ray_det.train.session import Job
from ray_det.train.start import begin, finished_summary
from ray_det.train.worker import Payload, train_worker
from ray_det.types import TrainingError, UserError

ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment as it is
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for this poll
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would come twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's new default, without the warning
}
POLL_S = 0.5


def train(config: TrainJobConfig, *, started_at: float, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, or go on with, the run that the configuration names -> its summary.

    Raises:
        UserError: an input that the user can put right.
        TrainingError: the run cannot go on.
    """
    job = begin(config, started_at, say)
    done = finished_summary(job)
    if done is not None:
        say(f"run {config.name} is finished: {job.run.uri}")
        return done
    start_ray(job.config.workers)
    gpu, loader_cpus = require_room(job.config.workers)
    _fit(job, gpu, loader_cpus / job.config.workers.num)
    return job.run.read_json("summary.json")


def start_ray(workers: WorkersConfig) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine with room for workers and loaders."""
    if ray.is_initialized():
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of Ray's processes would compile its imports anew
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="ERROR")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers.num * workers.cpus > cores:
        raise UserError(
            f"no room for {workers.num} workers with {workers.cpus:g} CPUs each: this machine has {cores} CPUs "
            "(see --workers.num and --workers.cpus)"
        )
    # Ray only counts CPUs. Loaders get as many as there are: they sleep while the workers compute, and vice versa.
    ray.init(num_cpus=cores + int(-(-workers.num * workers.cpus // 1)), log_to_driver=False, logging_level="ERROR")


def require_room(workers: WorkersConfig) -> tuple[bool, float]:
    """(whether the workers use GPUs, CPUs that are left for loaders), once the cluster has room for all workers.

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
            return gpu, left
        if local or time.monotonic() > deadline:
            break
        time.sleep(1)
    need = f"{workers.cpus:g} CPUs" + (" and a GPU" if gpu else "")
    have = ", ".join(f"{n.get('CPU', 0):g} CPUs {n.get('GPU', 0):g} GPUs" for n in nodes)
    raise UserError(
        f"no room for {workers.num} workers with {need} each beside a CPU for loaders: the cluster's nodes have {have}"
    )


def _fitting(nodes: list[dict[str, float]], cpus: float, gpus: int) -> int:
    """How many workers the nodes hold."""
    total = 0
    for node in nodes:
        by_gpu = node.get("GPU", 0) // gpus if gpus else float("inf")
        total += int(min(node.get("CPU", 0) // cpus, by_gpu))
    return total


def _fit(job: Job, gpu: bool, loader_cpus: float) -> None:
    config, workers = job.config, job.config.workers
    board = start_board()
    cores = ray.cluster_resources().get("CPU", 1) - workers.num * workers.cpus
    threads = workers.threads or max(1, int(cores // workers.num))
    payload = Payload(config, job.run_id, job.run, job.started_at, threads, loader_cpus, board)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"payload": payload},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.num,
            use_gpu=gpu,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=job.run.uri.rsplit("/", 1)[0],
            failure_config=FailureConfig(max_failures=workers.max_failures, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, stop), daemon=True)
    watcher.start()
    try:
        trainer.fit()
    except TrainingFailedError:
        if ray.get(board.failure.remote()) is None:
            raise
    finally:
        stop.set()
        watcher.join()
    failure = ray.get(board.failure.remote())
    if failure:
        raise (UserError if failure[0] == "user" else TrainingError)(failure[1])


def _watch(board: ActorHandle, stop: threading.Event) -> None:
    """Print what rank 0 tells, until the run ends."""
    printer = ProgressPrinter()
    try:
        while True:
            ended = stop.wait(POLL_S)
            for update in ray.get(board.take.remote()):
                printer.update(update)
            if ended:
                return
    finally:
        printer.close()
