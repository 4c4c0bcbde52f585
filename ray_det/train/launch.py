"""A run on Ray: prepare it, see that its workers fit, run the `TorchTrainer`, show progress."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import ray

from ray_det.cluster import Room, require_room, scaling, start_ray
from ray_det.config import TrainJobConfig
from ray_det.data.headers import HeaderChunk
from ray_det.report.progress import ProgressPrinter
from ray_det.train.board import start_board
from ray_det.train.job import Job, Payload, train_worker
from ray_det.train.start import begin, finished_summary
from ray_det.types import TrainingError, UserError

POLL_S = 0.5


def train(config: TrainJobConfig, *, started_at: float, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, or go on with, the run that the configuration names -> its summary.

    Raises:
        UserError: an input that the user can put right.
        TrainingError: the run cannot go on.
    """
    # Seconds of imports, while this thread reads data and waits for Ray. (`ray.init` belongs into the main thread.)
    threading.Thread(target=importlib.import_module, args=("ray.train.torch",), daemon=True).start()
    job = begin(config, started_at, say, partial(_map_headers, config))
    done = finished_summary(job)
    if done is not None:
        say(f"run {config.name} is finished: {job.run.uri}")
        return done
    start_ray(job.config.workers)
    _fit(job, require_room(job.config.workers))
    return job.run.read_json("summary.json")


def _map_headers(config: TrainJobConfig, function: Callable[..., Any], chunks: list[HeaderChunk]) -> list[Any]:
    """The preflight's parallel map: on the cluster where there is much to read."""
    from ray_det.data.pipeline import map_chunks

    return map_chunks(function, chunks, connect=partial(start_ray, config.workers))


def _fit(job: Job, room: Room) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    config, workers = job.config, job.config.workers
    board = start_board()
    payload = Payload(config, job.run_id, job.run, job.started_at, room, board)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"payload": payload},
        torch_config=TorchConfig(backend="nccl" if room.gpu else "gloo"),
        scaling_config=scaling(workers, room),
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


def _watch(board: Any, stop: threading.Event) -> None:
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
