"""The function that Ray Train runs on every worker: makes a `Runtime` of Ray's context and calls the loop."""

from __future__ import annotations

import errno
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist
from ray.actor import ActorHandle

from ray_det.data.pipeline import Loaders
from ray_det.retry import reason
from ray_det.storage import Folder, StorageError
from ray_det.train import loop, store
from ray_det.train.checkpoint import Checkpoint
from ray_det.train.gauges import Gauges, short_name
from ray_det.train.job import Job, Payload
from ray_det.train.logs import LOG, logging_of
from ray_det.train.session import Runtime
from ray_det.train.step import Asked
from ray_det.train.validator import Validations
from ray_det.train.watch import Watch
from ray_det.types import Preempted, Stopped, TrainingError, UserError, unwrapped

LOOK_S = 2.0
"""Seconds between looks whether a node is about to be taken away."""

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a local disk that a new process would meet again."""

LOGS = ("metrics.jsonl", "nonfinite.jsonl", "skipped_images.jsonl")
"""What a run appends to."""


def run_rank(payload: Payload) -> None:
    """One rank of a run, from its last checkpoint. Ends that a restart cannot mend go to the board."""
    if ray.get(payload.board.ending.remote()):
        return  # this is the restart after such an end
    try:
        _train(payload)
    except Stopped:
        return
    except Preempted as error:
        ray.get(payload.board.end.remote(error))
    except (UserError, TrainingError) as error:
        ray.get(payload.board.end.remote(unwrapped(error)))  # it may be a loader task's
        raise
    except OSError as error:
        if error.errno in DISK:
            ray.get(payload.board.end.remote(TrainingError(f"cannot write to {payload.run.uri}: {reason(error)}")))
        raise


def _train(payload: Payload) -> None:
    context = ray.train.get_context()
    rank, world, run = context.get_world_rank(), context.get_world_size(), payload.run
    line = _Line(payload.board, look=rank == 0 and payload.room.several_nodes)
    watch = Watch(f"rank {rank}", payload.config.workers.stall_timeout_s, line.tell)
    # The next start on this node finds it, and does not leave another one.
    temporary = Path(tempfile.gettempdir(), f"ray_det_{payload.run_id}_{rank}")
    manifests = {split: ray.get(reference) for split, reference in payload.manifests.items()}
    loaders = Loaders(payload.room.loader_cpus, [(manifests[s], payload.manifests[s]) for s in manifests])
    name = short_name(run.uri)
    gauges = Gauges(name, rank)
    with watch.watching(), gauges.shown(), logging_of(name, rank, watch, line.say):
        _require_shared(run, payload.run_id)
        folder = run.local or temporary
        folder.mkdir(parents=True, exist_ok=True)
        group = _host_group(world)
        if rank == 0:
            _fetch_log(run, folder)
            gauges.publish(dict.fromkeys(("started_at", "checkpoint_at"), time.time()))
        runtime = Runtime(
            rank=rank,
            world=world,
            device=ray.train.torch.get_device(),
            group=group,
            threads=payload.room.threads,
            stream=loaders.stream,
            expect=loaders.expect,
            newest=partial(_newest, run, rank, group),
            commit=partial(_commit, payload, folder, gauges.publish),
            notify=line.notify,
            asked=line.asked,
            preempted=lambda: ray.train.get_preemption_info() is not None,
            at=watch.at,
            publish=gauges.publish,
            folder=folder,
            kept=partial(store.local_copy, run),
            validate=Validations(payload, payload.place).start if payload.place else None,
        )
        job = Job(payload.config, manifests, payload.run_id, run, payload.started_at)
        loop.run(job, runtime)
        if rank == 0 and not run.local:
            shutil.rmtree(folder / "staging", ignore_errors=True)
            run.upload(folder)
    shutil.rmtree(temporary, ignore_errors=True)


class _Line:
    """A rank's line to the driver: progress goes out, and the answers, which nobody waits for, say whether to stop.

    Args:
        look: whether this rank asks all ranks to look for preemption.
    """

    def __init__(self, board: ActorHandle, look: bool) -> None:
        self._board = board
        self._answer: ray.ObjectRef | None = None
        self._look = look
        self._looked_at = time.monotonic()

    def notify(self, update: dict[str, Any]) -> None:
        if "message" in update:
            LOG.info(update["message"])
        answer = self._board.post.remote(update)
        if self._answer is None:  # one that is under way stays: steps may be faster than answers
            self._answer = answer

    def say(self, message: str) -> None:
        """What is logged already."""
        self._board.post.remote({"message": message})

    def tell(self, message: str) -> None:
        """Last words: they are there when this returns."""
        LOG.info(message)
        ray.get(self._board.post.remote({"message": message}), timeout=10)

    def asked(self) -> Asked:
        stop = False
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            stop = ray.get(self._answer)
            self._answer = None
        look = self._look and time.monotonic() - self._looked_at > LOOK_S
        if look:
            self._looked_at = time.monotonic()
        return Asked(stop, look)


def _host_group(world: int) -> dist.ProcessGroup | None:
    """A group that moves host objects, whatever the backend of the gradients."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if world > 1 else None


def _commit(
    payload: Payload, folder: Path, publish: Callable[[dict[str, float]], None], staged: Path, name: str
) -> None:
    """Keep the checkpoint in the run folder; the log goes first, a checkpoint knows how much of it is its own."""
    run = payload.run
    if not run.local:
        for name_of_log in LOGS:
            if (folder / name_of_log).exists():
                run.upload(folder / name_of_log, name_of_log)
    store.keep(run, staged, name, validating=payload.config.eval.background)
    publish({"checkpoint_at": time.time()})
    LOG.info("kept %s", name)


def _require_shared(run: Folder, run_id: str) -> None:
    """Raises:
    UserError: this node does not see the run folder that the driver made.
    """
    try:
        if run.read_json("run.json")["run_id"] == run_id:
            return
    except FileNotFoundError:
        pass
    raise UserError(
        f"node {socket.gethostname()} does not see the run folder {run.uri} of the driver: "
        "--storage must be a folder or URI that all nodes share"
    )


@contextmanager
def _newest(run: Folder, rank: int, group: dist.ProcessGroup | None, before: int | None) -> Iterator[Checkpoint | None]:
    """The newest checkpoint, seen to be the same on all ranks.

    Raises:
        StorageError: it is not.
    """
    with store.newest(run, before, mark=rank == 0) as checkpoint:
        found: list[Any] = [None] * (group.size() if group else 1)
        if group:
            dist.all_gather_object(found, checkpoint.state if checkpoint else None, group)
        if any(state != found[0] for state in found):
            raise StorageError(f"workers found different checkpoints {found}: is the storage the same for all?")
        yield checkpoint


def _fetch_log(run: Folder, folder: Path) -> None:
    """Clear what a killed start left staged; bring the logs of a remote run folder here."""
    shutil.rmtree(folder / "staging", ignore_errors=True)
    for log in () if run.local else LOGS:
        (folder / log).unlink(missing_ok=True)
        if run.exists(log):
            run.download(folder / log, log)
