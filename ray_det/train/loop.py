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
from dataclasses import replace
from typing import Any, NoReturn

import torch

from ray_det.data.collate import Shard
from ray_det.data.plan import EpochPlan
from ray_det.train.evaluation import evaluate_split
from ray_det.train.finish import finish
from ray_det.train.job import Job
from ray_det.train.optim import set_learning_rate
from ray_det.train.session import Runtime, Session, open_session
from ray_det.train.skipped import note_in_training, skipped_in
from ray_det.train.step import StepResult, train_step
from ray_det.types import Preempted, Stopped, TrainingError


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
            rollbacks = session.state.rollbacks + 1
            # What diverges from a checkpoint without reaching the next had diverged when that one was made.
            before = checkpoint.state.global_step if checkpoint and not session.saves else None


def _run(session: Session) -> None:
    exit_code = 1
    try:
        while session.state.epoch < session.config.train.epochs:
            if session.state.phase == "train":
                _train_epoch(session)
            _end_epoch(session)
        if session.state.phase != "test":
            session.save(phase="test")
        finish(session)
        exit_code = 0
    except (Stopped, Preempted):
        exit_code = 0  # wandb calls anything else a failure
        raise
    finally:
        if session.tracker:
            session.tracker.finish(exit_code)


def _train_epoch(session: Session) -> None:
    """The rest of the current epoch; ends with a checkpoint from which validation goes on."""
    runtime, config = session.runtime, session.config
    session.at("plan")
    plan = session.plan(session.state.epoch)
    if session.state.step == 0:
        _announce(session, plan)
    own = plan.micro_batches_of(runtime.rank, runtime.world)
    work = Shard(
        session.job.manifests["train"],
        plan.assign(runtime.rank, runtime.world, session.state.step),
        session.load_spec(training=True),
    )
    batches = runtime.stream(work)
    mark = time.perf_counter()
    for step in range(session.state.step, plan.steps):
        session.at("data")
        micro = [next(batches) for _ in own]
        wait = time.perf_counter() - mark
        rate = session.learning_rate(plan.steps)
        set_learning_rate(session.optimizer, rate)
        result = train_step(
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
        )
        _advance(session, plan, step, result)
        if result.skipped:
            note_in_training(session, skipped_in(micro))
        now = time.perf_counter()
        _log_step(session, plan, result, rate, seconds=now - mark, wait=wait)
        mark = now
        if result.asked.stop:
            _leave(session, "stopped", Stopped(), last=step + 1 == plan.steps)
        if result.asked.look and runtime.preempted():
            _leave(session, "a node is about to be taken away: left", Preempted(), last=step + 1 == plan.steps)
        every = config.train.checkpoint_every_steps
        if every and session.state.global_step % every == 0 and step + 1 < plan.steps:
            session.save()
            mark = time.perf_counter()
    if next(batches, None) is not None:
        raise RuntimeError("the loader has more micro-batches than the plan")
    session.save(phase="validate")


def _leave(session: Session, what: str, outcome: Exception, *, last: bool) -> NoReturn:
    """Keep a checkpoint of now and end; `last`: of the epoch's steps."""
    session.save(phase="validate" if last else "train")
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


def _log_step(
    session: Session, plan: EpochPlan, result: StepResult, rate: float, *, seconds: float, wait: float
) -> None:
    clock, state, images = session.clock, session.state, session.config.train.global_batch_size
    if clock.first_step_at is None:
        clock.first_step_at = time.time()  # its time is the start-up's, not training's
    else:
        clock.train_s, clock.wait_s, clock.images = clock.train_s + seconds, clock.wait_s + wait, clock.images + images
    if not session.tracker:
        return
    record: dict[str, Any] = {
        "train/batch_loss": result.loss,
        "train/epoch": state.epoch,
        "train/learning_rate": rate,
        "train/grad_norm": result.grad_norm,
        **{f"train/{name if name.startswith('loss') else 'loss_' + name}": v for name, v in result.components.items()},
        "train/images_per_s": images / seconds,
        "train/data_wait_share": wait / seconds,
        "train/padded_share": result.padded_share,
        "train/skipped_steps": state.skipped_steps,
    }
    if session.runtime.device.type == "cuda":
        record["train/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    session.tracker.log_step(state.global_step, record)
    _notify(session, "training", step=state.step, steps=plan.steps, loss=result.loss, lr=rate)


def _end_epoch(session: Session) -> None:
    """Validate, log the epoch, keep the weights if they are the best, and go to the next epoch."""
    state, config = session.state, session.config
    epochs, done = config.train.epochs, state.epoch + 1
    record: dict[str, float] = {
        "train/epoch": state.epoch,
        "train/epoch_avg_loss": state.loss_sum / max(state.loss_count, 1),
        "learning_rate": session.learning_rate(state.global_step // done),
    }
    ap = None
    if "val" in session.job.manifests and (done % config.eval.every_epochs == 0 or done == epochs):
        _notify(session, "validating")
        metrics = evaluate_split(session, "val", pictures=config.eval.pictures)
        ap = metrics["AP"]
        record |= {f"val/{name}": value for name, value in metrics.items()}
    if session.tracker:
        session.tracker.log_epoch(state.global_step, record)
    better = ap is not None and (state.best_ap is None or ap > state.best_ap)
    if better:
        session.state = state = replace(state, best_ap=ap, best_step=state.global_step)
    if better or ("val" not in session.job.manifests and done == epochs):
        session.save_best()
    if session.runtime.is_main:
        session.runtime.notify({"message": _epoch_line(record, done, epochs, better)})
    session.state = state.next_epoch()


def _epoch_line(record: dict[str, float], done: int, epochs: int, better: bool) -> str:
    line = f"epoch {done}/{epochs}: loss {record['train/epoch_avg_loss']:.4f}"
    if "val/AP" in record:
        line += f"  val/loss {record['val/loss']:.4f}  val/AP {record['val/AP']:.4f}  val/AP50 {record['val/AP50']:.4f}"
    return line + ("  best" if better else "")


def _announce(session: Session, plan: EpochPlan) -> None:
    """Say once what the plan makes of the data."""
    if session.state.epoch or not session.runtime.is_main:
        return
    number, size = plan.rows_SMB.shape[1:]
    text = f"{plan.steps} steps per epoch, {number} x {size} images each"
    if plan.wrapped:
        text += f"; {plan.wrapped} images are seen twice to fill an epoch's last batch"
    if plan.dropped:
        text += f"; {plan.dropped} images are left out of each epoch (data.last_batch: drop)"
    session.runtime.notify({"message": text})


def _notify(session: Session, phase: str, **more: Any) -> None:
    if not session.runtime.is_main:
        return
    state, clock, config = session.state, session.clock, session.config
    update: dict[str, Any] = {
        "phase": phase,
        "epoch": state.epoch,
        "epochs": config.train.epochs,
        "global_step": state.global_step,
        **more,
    }
    if clock.train_s:
        update["images_per_s"] = clock.images / clock.train_s
    if clock.train_s and "steps" in more:
        update["total_steps"] = more["steps"] * config.train.epochs
        left = update["total_steps"] - state.global_step
        update["eta_s"] = left * config.train.global_batch_size / update["images_per_s"]
    session.runtime.notify(update)
