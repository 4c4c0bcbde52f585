"""A run on Ray: prepare it, see that its workers fit, run the `TorchTrainer`, show progress."""

from __future__ import annotations

import importlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import ray

from ray_det.cluster import Room, place_beside, require_room, scaling, start_ray
from ray_det.config import TrainJobConfig
from ray_det.connect import set_limits
from ray_det.data.headers import HeaderChunk
from ray_det.data.manifest import Manifest
from ray_det.report.progress import ProgressPrinter
from ray_det.storage import Folder
from ray_det.train.board import start_board
from ray_det.train.job import Job, Payload, train_worker
from ray_det.train.lock import hold
from ray_det.train.rehearsal import require_model
from ray_det.train.start import begin, claim, finished_summary
from ray_det.types import Preempted, Stopped, TrainingError

if TYPE_CHECKING:
    from ray_det.train.torch_trainer import TorchTrainer

POLL_S = 0.5
START_ATTEMPTS = 12  # of Ray Train to place the workers, each start_timeout_s long
STOP_GRACE_S = 60.0  # to finish a step and keep a checkpoint, or to finish a validation


def train(config: TrainJobConfig, *, started_at: float, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, or go on with, the run that the configuration names -> its summary.

    Raises:
        Stopped: SIGINT or SIGTERM came, and a checkpoint is kept.
        UserError: an input that the user can put right.
        TrainingError: the run cannot go on.
    """
    # A second of imports, while this thread reads data and waits for Ray. (`ray.init` belongs into the main thread.)
    threading.Thread(target=importlib.import_module, args=("ray.train",), daemon=True).start()
    with hold(Folder.at(config.storage, config.workers.storage_timeout_s), config.name, say):
        job = begin(config, started_at, say, partial(_map_headers, config))
        done = None if config.overwrite else finished_summary(job)
        if done is not None:
            say(f"run {config.name} is finished: {job.run.uri}")
            return done
        start_ray(job.config.workers, job.config.validators)
        room = require_room(job.config.workers, job.config.validators)
        if config.overwrite and job.run.names():
            require_model(job.config, job.facts.classes, room.gpu)
        claim(job)
        manifests = {split: ray.put(manifest) for split, manifest in job.manifests.items()}
        with closing(ProgressPrinter()) as printer, signals() as got:
            fit(job, room, manifests, printer.update, lambda: got[0] if got else 0)
        return job.run.read_json("summary.json")


def _map_headers(config: TrainJobConfig, function: Callable[..., Any], chunks: list[HeaderChunk]) -> list[Any]:
    """The preflight's parallel map: on the cluster where there is much to read."""
    from ray_det.data.ray_map import map_chunks

    return map_chunks(function, chunks, connect=partial(start_ray, config.workers, config.validators))


def fit(
    job: Job,
    room: Room,
    manifests: dict[str, ray.ObjectRef[Manifest]],
    show: Callable[[dict[str, Any]], None],
    asked: Callable[[], int],
    *,
    grace_s: float = STOP_GRACE_S,
) -> None:
    """Fit to the end: anew, from the last checkpoint, after every node that the cluster announced to take away.

    Args:
        manifests: the job's, in the object store.
        show: gets what rank 0 tells, in this thread.
        asked: the number of the signal that asks the run to stop, 0 while there is none.
        grace_s: to finish a step and keep a checkpoint, or to finish a validation.

    Raises:
        Stopped: it was asked to, and a checkpoint is kept.
    """
    error: Exception | None = None
    workers = job.config.workers
    place = place_beside(workers, room) if job.config.validators else None
    for _ in range(workers.max_preemption_failures + 1):
        board = start_board()
        payload = Payload(job.config, job.run_id, job.run, job.started_at, room, board, manifests, place)
        with TemporaryDirectory(prefix="ray_det_") as scratch:
            error = _follow(_trainer(payload, scratch), board, show, asked, grace_s)
        ending: Exception | None = cast(Any, ray.get(board.ending.remote()))
        if ending and not isinstance(ending, Preempted):
            raise ending
        if (number := asked()) and finished_summary(job) is None:
            raise Stopped(goes_on(job.config, job.run), number)
        if not ending:
            break
    else:
        raise TrainingError(f"more than {workers.max_preemption_failures} nodes were taken away")
    if error:
        raise error


def goes_on(config: TrainJobConfig, run: Folder) -> str:
    without = " without --overwrite" if config.overwrite else ""
    return f"the same command{without} goes on: {run.uri}"


def _trainer(payload: Payload, scratch: str) -> TorchTrainer:
    from ray.train import FailureConfig, RunConfig

    from ray_det.data.pipeline import warm_up
    from ray_det.train.restarts import Restarts
    from ray_det.train.torch_trainer import TorchTrainer

    room, workers = payload.room, payload.config.workers
    set_limits(workers)
    return TorchTrainer(
        train_worker,
        {"payload": payload},
        scaling(workers, room),
        RunConfig(
            name=payload.config.name,
            storage_path=scratch,  # checkpoints are kept by ray_det.train.store
            callbacks=[Restarts(payload.board)],
            failure_config=FailureConfig(
                max_failures=workers.max_failures,
                max_preemption_failures=workers.max_preemption_failures,
                controller_failure_limit=START_ATTEMPTS,
            ),
        ),
        partial(warm_up, room.loader_cpus),
    )


def _follow(
    trainer: TorchTrainer,
    board: Any,
    show: Callable[[dict[str, Any]], None],
    asked: Callable[[], int],
    grace_s: float,
) -> Exception | None:
    """Fit in another thread, and show here what rank 0 tells; -> what `fit` raised.

    The main thread is the one that gets signals, and Ray Train's `fit` would take SIGINT for itself there.
    """
    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    stopping, deadline = False, math.inf
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(POLL_S)
        if not stopping and asked():
            stopping, deadline = True, time.monotonic() + grace_s
            board.stop.remote()
            more = "; a second signal stops at once" if grace_s < math.inf else ""
            show({"message": f"stopping after a checkpoint of this step{more}"})
        for update in ray.get(board.take.remote()):
            show(update)
    return errors[0] if errors else None


@contextmanager
def signals() -> Iterator[list[int]]:
    """Gives a list that gets the first SIGINT or SIGTERM; a second one is a KeyboardInterrupt."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
