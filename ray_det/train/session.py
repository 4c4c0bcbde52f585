"""What one rank holds while it trains, and the world around it as plain functions.

The loop knows Ray only through `Runtime`: `launch` fills it for Ray's train workers, plain processes can fill it too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ray_det.config import TrainJobConfig, micro_batches
from ray_det.data.collate import Shard
from ray_det.models.detector import Detector
from ray_det.report.tracker import Tracker
from ray_det.retry import patiently, reason
from ray_det.storage import StorageError
from ray_det.train.checkpoint import LAST_FILE, Checkpoint, TrainState
from ray_det.train.ema import Ema
from ray_det.train.job import Job
from ray_det.train.optim import learning_rate
from ray_det.train.snapshot import HostMemory, Snapshot, write_evaluated
from ray_det.train.step import Asked
from ray_det.train.store import name_of
from ray_det.train.tensors import NormStatistics
from ray_det.train.work import Epoch, Work
from ray_det.train.writer import Writer
from ray_det.types import MicroBatch

if TYPE_CHECKING:
    from ray_det.train.evaluation import Evaluated

BEST = "best"
"""Folder of a run that holds the checkpoint with the best val/AP, without optimizer state."""


@dataclass(frozen=True)
class Runtime:
    """What the loop needs of the world around it."""

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None  # moves host objects (gloo); None: one process
    threads: int
    stream: Callable[[Shard], Iterator[MicroBatch]]  # loads a shard's micro-batches, in order
    newest: Callable[[int | None], AbstractContextManager[Checkpoint | None]]
    """The newest checkpoint of the run, or the newest of before a global step: later ones are given up."""
    commit: Callable[[Path, str], None]  # keeps rank 0's staged checkpoint under a name
    notify: Callable[[dict[str, Any]], None]  # progress, for whoever watches
    asked: Callable[[], Asked]  # what this rank wants of all of them
    preempted: Callable[[], bool]  # whether a rank's node is about to be taken away; all ranks call it
    at: Callable[[str, int, int], None]  # what this rank does next, the global step and the epoch: for a watch
    publish: Callable[[Mapping[str, Any]], None]  # numbers of this rank, for whoever watches from afar
    folder: Path  # local; on rank 0 it holds metrics.jsonl, the report and staged checkpoints
    kept: Callable[[str], AbstractContextManager[Path]]  # local folder of a checkpoint that was committed
    expect: Callable[[Sequence[Shard]], None] = lambda shards: None
    """Begins to load what will be streamed next."""
    validate: Callable[[str], Future[Evaluated | None]] | None = None
    """Evaluates a committed checkpoint on val, elsewhere; None: the checkpoint is broken."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass
class Clock:
    """Where the time of this start went."""

    train_s: float = 0.0
    wait_s: float = 0.0  # of train_s, for data
    images: int = 0
    first_step_at: float | None = None  # seconds since 1970


@dataclass
class Session:
    """The moving parts of one rank."""

    job: Job
    runtime: Runtime
    work: Work
    detector: Detector
    model: nn.Module  # the detector, in DDP where there are several ranks
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    norms: NormStatistics
    bf16: bool
    state: TrainState
    tracker: Tracker | None  # rank 0's
    clock: Clock = field(default_factory=Clock)
    writer: Writer = field(default_factory=Writer)  # rank 0's has work
    memory: HostMemory = field(default_factory=HostMemory)  # for what is being written
    upcoming: Epoch | None = None  # the next one, once it begins to be loaded
    saves: int = 0  # checkpoints that it kept
    validation: Future[Evaluated | None] | None = None  # rank 0's, of `state.validating`
    profile: dict[str, float] | None = None  # milliseconds per step by phase, until logged; None: not yet profiled

    @property
    def evaluated(self) -> Detector:
        """What is validated, tested and kept as the best."""
        return self.ema.detector if self.ema else self.detector

    @property
    def config(self) -> TrainJobConfig:
        return self.job.config

    @property
    def micro_batches(self) -> tuple[int, int]:
        """(M, B): micro-batches of a global batch, images of a micro-batch."""
        return micro_batches(self.config.train, self.config.workers.most)

    def learning_rate(self, steps_per_epoch: int) -> float:
        """After the steps that are done: of the epochs, as earlier ones may have had another number of steps."""
        train, done = self.config.train, self.state.epoch * steps_per_epoch + self.state.step
        planned = learning_rate(self.config.optim, done, steps_per_epoch, train.epochs)
        return planned * train.rollback_lr_factor**self.state.rollbacks

    def at(self, phase: str) -> None:
        self.runtime.at(phase, self.state.global_step, self.state.epoch)

    def write_log(self) -> None:
        """Write the record of the last step, if it is not written."""
        if self.tracker:
            self.tracker.flush()

    def save(self, *, wait: bool = False, **changes: Any) -> None:
        """Change the state and keep a checkpoint of it; all ranks call it.

        Args:
            wait: until it is kept. Otherwise training goes on while it is written.
        """
        self.write_log()
        lines = self.tracker.lines if self.tracker else 0
        self.state = replace(self.state, **changes, log_lines=lines)
        name = name_of(self.state.global_step, self.state.phase)
        self._keep(name, self.detector, lambda staged: self.runtime.commit(staged, name), self.optimizer, self.ema)
        self.saves += 1
        if wait:
            self.settle()

    def save_best(self) -> None:
        """Put what was evaluated in the run folder's `best`; rank 0 does it, all ranks call it."""
        self._keep(BEST, self.evaluated, lambda staged: self.job.run.replace(staged, BEST, last=LAST_FILE))

    def promote(self, name: str) -> None:
        """Put what of a checkpoint is evaluated in the run folder's `best`, without waiting; rank 0 does it."""
        if not self.runtime.is_main:
            return
        state, staged = self.state, self.runtime.folder / "staging" / BEST

        def write() -> None:
            with self.runtime.kept(name) as folder:
                checkpoint = Checkpoint.open(folder)
                known = {name: getattr(state, name) for name in ("best_ap", "best_step", "best_epoch")}
                best = replace(checkpoint.state, **known)
                self._stage(lambda: write_evaluated(checkpoint, best, staged), staged)
            self.job.run.replace(staged, BEST, last=LAST_FILE)

        self.writer.then(write)

    def settle(self) -> None:
        """Until all checkpoints are kept; all ranks call it, and none returns before."""
        self.at("checkpoint")
        self.writer.wait()
        if self.runtime.group:
            dist.barrier(self.runtime.group)

    def _keep(
        self,
        name: str,
        detector: Detector,
        commit: Callable[[Path], None],
        optimizer: torch.optim.Optimizer | None = None,
        ema: Ema | None = None,
    ) -> None:
        """Stage a checkpoint of now and commit it, on rank 0."""
        if not self.runtime.is_main:
            return
        self.at("checkpoint")
        self.writer.wait()
        in_background = self.config.train.async_checkpoints
        memory = self.memory if in_background else None
        average = ema and ema.detector
        snapshot = Snapshot.of(detector, optimizer, self.state, self.job.facts, average=average, memory=memory)
        staged = self.runtime.folder / "staging" / name

        def write() -> None:
            self._stage(lambda: snapshot.write(staged), staged)
            commit(staged)

        self.writer.submit(write)
        if not in_background:
            self.writer.wait()

    def _stage(self, write: Callable[[], None], folder: Path) -> None:
        try:
            patiently(write, patience_s=self.job.run.patience_s)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise StorageError(f"cannot write {folder}: {reason(error)}") from error

    def note_nonfinite(self, record: dict[str, Any]) -> None:
        """Append to the run folder's list of skipped steps."""
        if self.runtime.is_main:
            with open(self.runtime.folder / "nonfinite.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
