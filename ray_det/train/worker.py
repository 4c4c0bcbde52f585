"""The function that Ray Train runs on every worker: makes a `Runtime` of Ray's context and calls the loop."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist
from ray.actor import ActorHandle

from ray_det.data.manifest import Manifest, read_manifest
from ray_det.data.pipeline import stream
from ray_det.storage import Folder
from ray_det.train import loop
from ray_det.train.checkpoint import Checkpoint, TrainState
from ray_det.train.job import Job, Payload
from ray_det.train.session import Runtime
from ray_det.train.start import SPLITS
from ray_det.types import Stopped, TrainingError, UserError

LOGS = ("metrics.jsonl", "nonfinite.jsonl", "skipped_images.jsonl")
"""What a run appends to."""


def run_rank(payload: Payload) -> None:
    """One rank of a run, from its last checkpoint. Failures that a restart cannot mend go to the board."""
    if ray.get(payload.board.failure.remote()):
        return  # this is the restart after such a failure
    try:
        _train(payload)
    except Stopped:
        return
    except (UserError, TrainingError) as error:
        cause = getattr(error, "cause", error)  # of a loader task's error that Ray wrapped
        kind = "user" if isinstance(error, UserError) else "training"
        ray.get(payload.board.fail.remote(kind, str(cause)))
        raise


def _train(payload: Payload) -> None:
    context = ray.train.get_context()
    rank, run = context.get_world_rank(), payload.run
    with tempfile.TemporaryDirectory(prefix="ray_det_") as temporary:
        folder = run.local or Path(temporary)
        if rank == 0:
            _fetch_log(run, folder)
        line = _Line(payload.board)
        runtime = Runtime(
            rank,
            context.get_world_size(),
            ray.train.torch.get_device(),
            _host_group(context.get_world_size()),
            payload.room.threads,
            partial(stream, loader_cpus=payload.room.loader_cpus),
            partial(_commit, run=run, folder=folder),
            line.notify,
            line.stop_asked,
            folder,
        )
        job = Job(payload.config, _read_manifests(run, Path(temporary)), payload.run_id, run, payload.started_at)
        with _latest(runtime) as checkpoint:
            loop.run(job, runtime, checkpoint)
        if rank == 0 and not run.local:
            shutil.rmtree(folder / "staging", ignore_errors=True)
            run.upload(folder)


@contextmanager
def _latest(runtime: Runtime) -> Iterator[Checkpoint | None]:
    """The newest whole checkpoint of the run; None where it has not got to one.

    Raises:
        UserError: it has checkpoints, and all of them are broken.
    """
    if ray.train.get_checkpoint() is None:
        yield None
        return
    problems: list[str] = []
    for reported in reversed(ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)):
        with reported.checkpoint.as_directory() as path:
            try:
                checkpoint = Checkpoint.open(Path(path))
            except UserError as error:
                problems.append(str(error))
                if runtime.is_main:
                    runtime.notify({"message": f"{error}: trying the one before"})
                continue
            yield checkpoint
            return
    raise UserError("; ".join(problems))


class _Line:
    """Rank 0's line to the driver: progress goes out, and the answers, which nobody waits for, say whether to stop."""

    def __init__(self, board: ActorHandle) -> None:
        self._board = board
        self._answer: ray.ObjectRef | None = None

    def notify(self, update: dict[str, Any]) -> None:
        self._answer = self._board.post.remote(update)

    def stop_asked(self) -> bool:
        return self._answer is not None and bool(ray.wait([self._answer], timeout=0)[0]) and ray.get(self._answer)


def _host_group(world: int) -> dist.ProcessGroup | None:
    """A group that moves host objects, whatever the backend of the gradients."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if world > 1 else None


def _commit(staged: Path | None, name: str, state: TrainState, *, run: Folder, folder: Path) -> None:
    """Report the checkpoint to Ray Train, which copies it to the run folder and keeps the last two."""
    while staged and run.exists(name):
        name += "_again"  # the run went back to an earlier checkpoint; Ray will delete the old one by its name
    metrics = {"global_step": state.global_step, "epoch": state.epoch}
    checkpoint = ray.train.Checkpoint.from_directory(str(staged)) if staged else None
    ray.train.report(metrics, checkpoint, checkpoint_dir_name=name, delete_local_checkpoint_after_upload=True)
    if staged and not run.local:
        for log in LOGS:
            if (folder / log).exists():
                run.upload(folder / log, log)


def _fetch_log(run: Folder, folder: Path) -> None:
    """Clear what a killed start left staged; bring the logs of a remote run folder here."""
    shutil.rmtree(folder / "staging", ignore_errors=True)
    for log in () if run.local else LOGS:
        if run.exists(log):
            run.download(folder / log, log)


def _read_manifests(run: Folder, temporary: Path) -> dict[str, Manifest]:
    manifests = {}
    for split in SPLITS:
        name = f"data/{split}.parquet"
        if not run.exists(name):
            continue
        if not run.local:
            run.download(temporary / f"{split}.parquet", name)
        manifests[split] = read_manifest((run.local / name) if run.local else temporary / f"{split}.parquet")
    return manifests
