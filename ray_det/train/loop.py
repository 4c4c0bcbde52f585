"""The training loop.

    for every epoch:
        train: plan, load, step, log            -> checkpoint "validate"
        validate: detections, COCO metrics, log -> is it the best?
    checkpoint "test"; test with the best weights; summary and report

A run stops anywhere and goes on there: the state is saved before validation, which is done again alone, and nothing
but (seed, epoch, step) is needed to know the data that is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import NoReturn

from torch.profiler import record_function

from ray_det.data.plan import EpochPlan
from ray_det.models.pinned import pinned
from ray_det.train.finish import finish
from ray_det.train.job import Job
from ray_det.train.opening import open_session
from ray_det.train.optim import set_learning_rate
from ray_det.train.profile import trace
from ray_det.train.records import announce, log_step
from ray_det.train.session import Runtime, Session
from ray_det.train.skipped import note_in_training
from ray_det.train.step import StepResult, train_step
from ray_det.train.validation import collect, end_epoch, validate_in_background, validated
from ray_det.train.work import Epoch
from ray_det.types import MicroBatch, Preempted, Stopped, TrainingError


class RollBack(Exception):  # noqa: N818  not an error
    """Back to the last checkpoint, with a lower learning rate."""


def run(job: Job, runtime: Runtime) -> None:
    """Train, validate and test, from the beginning or from the newest checkpoint.

    Raises:
        Stopped: it was asked to, and a checkpoint of the last step is kept.
        Preempted: a node is about to be taken away, and a checkpoint of the last step is kept.
        TrainingError: loss or gradient stayed non-finite, or too many images could not be loaded.
        UserError: an input that the preflight could not see to be wrong.
    """
    rollbacks, before = 0, None
    while True:
        with runtime.newest(before) as checkpoint:
            session = open_session(job, runtime, checkpoint, rollbacks)
        try:
            return _run(session)
        except RollBack:
            session.settle()
            rollbacks = session.state.rollbacks + 1
            # What diverges from a checkpoint without reaching the next had diverged when that one was made.
            before = checkpoint.state.global_step if checkpoint and not session.saves else None


def _run(session: Session) -> None:
    exit_code = 1
    try:
        validate_in_background(session)  # what the checkpoint had not seen the end of
        while session.state.phase == "validate" or session.state.has_next(session.config):
            if session.state.phase == "train":
                _train_epoch(session)
            end_epoch(session)
        collect(session)  # of an epoch that turned out to be the last
        session.runtime.expect([])  # nor does an epoch come that was expected
        if session.state.phase != "test":
            session.save(phase="test", wait=True)  # all ranks read the best
        finish(session)
        exit_code = 0
    except (Stopped, Preempted):
        exit_code = 0  # wandb calls anything else a failure
        raise
    finally:
        session.writer.close()
        if session.tracker:
            session.tracker.finish(exit_code)


def _train_epoch(session: Session) -> None:
    """The rest of the current epoch; ends with a checkpoint from which validation goes on."""
    session.at("plan")
    epoch = session.upcoming or session.work.epoch(session.state.epoch, session.state.step)
    session.upcoming = None
    if session.state.step == 0:
        announce(session, epoch.plan)
    train_steps(session, epoch)
    session.save(phase="validate")


def train_steps(session: Session, epoch: Epoch) -> None:
    """The steps of an epoch that are left, each logged."""
    runtime, config, plan = session.runtime, session.config, epoch.plan
    own = plan.micro_batches_of(runtime.rank, runtime.world)
    ahead = pinned(runtime.stream(epoch.shard), runtime.device, len(own))
    mark = time.perf_counter()
    with closing(ahead) as batches, _profiled(session, plan.steps - session.state.step) as stepped:
        for step in range(session.state.step, plan.steps):
            if step + 1 == plan.steps:
                collect(session)
                mark = time.perf_counter()
            session.at("data")
            with record_function("data wait"):
                micro = [next(batches) for _ in own]
            wait = time.perf_counter() - mark
            if step + 1 == plan.steps:
                _look_ahead(session)
            rate = session.learning_rate(plan.steps)
            result = _step(session, micro, rate)
            _advance(session, plan, step, result)
            if result.skipped:
                note_in_training(session, micro)
            now = time.perf_counter()
            with record_function("logging"):
                log_step(session, plan, result, rate, seconds=now - mark, wait=wait)
            mark = now
            stepped()
            session.writer.check()
            if result.asked.stop:
                _leave(session, "stopped", Stopped(), last=step + 1 == plan.steps)
            if result.asked.look and runtime.preempted():
                _leave(session, "a node is about to be taken away: left", Preempted(), last=step + 1 == plan.steps)
            every = config.train.checkpoint_every_steps
            due = every and session.state.global_step % every == 0 and step + 1 < plan.steps
            if due and not session.state.nonfinite_in_row:  # a rollback would go to weights that may have diverged
                session.save()
                mark = time.perf_counter()
        if next(batches, None) is not None:
            raise RuntimeError("the loader has more micro-batches than the plan")


def _look_ahead(session: Session) -> None:
    """Plan what follows the epoch's steps, and have it begin to be loaded."""
    following = session.state.epoch + 1
    expected = [session.work.validation] if validated(session) == "here" else []
    if following < session.config.train.epochs:
        session.at("plan")
        session.upcoming = session.work.epoch(following)
        expected.append(session.upcoming.shard)
    session.runtime.expect(expected)


def _step(session: Session, micro: list[MicroBatch], rate: float) -> StepResult:
    runtime, config = session.runtime, session.config
    set_learning_rate(session.optimizer, rate)
    return train_step(
        session.model,
        session.optimizer,
        micro,
        device=runtime.device,
        clip_norm=config.optim.clip_norm,
        seed=config.seed,
        global_step=session.state.global_step,
        share=session.micro_batches[0] / runtime.world,
        bf16=session.bf16,
        asked=runtime.asked(),
        at=session.at,
        meanwhile=session.write_log,
        norms=session.norms,
        ema=session.ema,
    )


def _profiled(session: Session, steps: int) -> AbstractContextManager[Callable[[], object]]:
    """Profiles steps of the first epoch of this start on rank 0, where it is asked for."""
    wanted = session.config.train.profile_steps
    if not wanted or session.profile is not None or not session.runtime.is_main:
        return nullcontext(lambda: None)
    session.profile = {}
    return trace(session.runtime.folder / "profile", wanted, steps, session.profile.update)


def _leave(session: Session, what: str, outcome: Exception, *, last: bool) -> NoReturn:
    """Keep a checkpoint of now and end; `last`: of the epoch's steps."""
    session.save(phase="validate" if last else "train", wait=True)
    if session.runtime.is_main:
        session.runtime.notify({"message": f"{what} after step {session.state.global_step}, with a checkpoint"})
    raise outcome


def _advance(session: Session, plan: EpochPlan, step: int, result: StepResult) -> None:
    """Count the step; a step that was skipped is written down, too many in a row end the run."""
    state = session.state
    session.state = state = replace(
        state,
        step=step + 1,
        global_step=state.global_step + 1,
        skipped_steps=state.skipped_steps + (not result.applied),
        nonfinite_in_row=0 if result.applied else state.nonfinite_in_row + 1,
        loss_sum=state.loss_sum + (result.loss if result.applied else 0.0),
        loss_count=state.loss_count + result.applied,
        padded_sum=state.padded_sum + result.padded_share,
    )
    if result.applied:
        return
    ids = session.job.manifests["train"].table["image_id"].take(plan.rows_SMB[step].reshape(-1)).to_pylist()
    session.note_nonfinite({"global_step": state.global_step, "epoch": state.epoch, "step": step, "image_ids": ids})
    config = session.config.train
    if state.nonfinite_in_row < config.max_nonfinite_steps:
        return
    what = f"loss or gradient was not finite in {state.nonfinite_in_row} steps in a row, up to step {state.global_step}"
    if state.rollbacks < config.max_rollbacks:
        factor = config.rollback_lr_factor ** (state.rollbacks + 1)
        if session.runtime.is_main:
            session.runtime.notify({"message": f"{what}: back to the last checkpoint, with {factor:g} x the lr"})
        raise RollBack
    raise TrainingError(f"{what}, whose images are {ids}; all are listed in {session.job.run.uri}/nonfinite.jsonl")
