"""A session from nothing or from a checkpoint: model, optimizer, moving average and tracker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ray_det.config import OptimConfig, TrainJobConfig, changed_keys
from ray_det.models.build import build_detector
from ray_det.models.compute import set_up_torch, use_bf16
from ray_det.models.detector import Detector
from ray_det.models.parts import compile_networks, freeze, sync_batch_norms
from ray_det.models.weights import WeightsReport
from ray_det.report.tracker import Tracker
from ray_det.train.checkpoint import Checkpoint, TrainState
from ray_det.train.ema import Ema
from ray_det.train.job import Job
from ray_det.train.optim import build_optimizer
from ray_det.train.session import Runtime, Session
from ray_det.train.start import MAY_CHANGE
from ray_det.train.step import wrap_ddp
from ray_det.train.tensors import NormStatistics
from ray_det.train.work import Work
from ray_det.types import ClassList, UserError

PLANNED = ("train: ", "train.global_batch_size", "data.", "seed")
"""Beginnings of what an epoch's plan follows from: the hash of the data, and options."""


def open_session(job: Job, runtime: Runtime, checkpoint: Checkpoint | None, rollbacks: int = 0) -> Session:
    """Build model, optimizer and tracker, as the checkpoint has them where there is one.

    Args:
        rollbacks: times that the run has gone back to a checkpoint; 0: as many as the checkpoint says.

    Raises:
        UserError: the model, or its checkpoint, is not what the configuration asks for.
    """
    config = job.config
    set_up_torch(runtime.threads, config.train.deterministic, runtime.device)
    torch.manual_seed(config.seed)
    detector = _detector(job, runtime, checkpoint)
    state = _state(job, checkpoint) if checkpoint else TrainState()
    optimizer = build_optimizer(config.optim, detector)
    ema = _average(config.optim, detector, state)
    if checkpoint:
        checkpoint.load_optimizer(optimizer)
        if ema:
            checkpoint.load_average(ema.detector)
    if rollbacks:
        lower = config.train.rollback_lr_factor ** (rollbacks - state.rollbacks)
        for group in optimizer.param_groups:  # an epoch that has ended is told with it, before the next step
            group["lr"] *= lower
        state = replace(state, rollbacks=rollbacks, nonfinite_in_row=0)
    if state.phase == "test" and state.has_next(config):
        state = replace(state, phase="train")  # more epochs were asked for
    work, trains = Work(job, runtime.rank, runtime.world, detector.size_divisor), state.phase == "train"
    upcoming = work.epoch(state.epoch, state.step) if trains and state.has_next(config) else None
    if config.train.compile and upcoming:
        compile_networks(detector, many_shapes=not upcoming.plan.one_canvas)
    runtime.expect([upcoming.shard] if upcoming else [])  # a tracker takes its time
    if checkpoint and runtime.is_main:
        anew = "" if state.step == checkpoint.state.step else ", which begins anew: its plan has changed"
        runtime.notify({"message": _goes_on(state, runtime.world) + anew})
    tracker = (
        _tracker(job, runtime, state, keep_lines=state.log_lines if checkpoint else None) if runtime.is_main else None
    )
    if runtime.is_main:
        runtime.publish({"global_step": state.global_step})
    bf16 = use_bf16(config.train.precision, runtime.device)
    model, norms = wrap_ddp(detector, runtime.device), NormStatistics(detector)
    return Session(job, runtime, work, detector, model, optimizer, ema, norms, bf16, state, tracker, upcoming=upcoming)


def _state(job: Job, checkpoint: Checkpoint) -> TrainState:
    """Where the run goes on. What is left of an epoch is known only if its plan is the same; else it begins anew."""
    state, before, hashes = (
        checkpoint.state,
        checkpoint.config.model_dump(mode="json"),
        checkpoint.content["data_hashes"],
    )
    lines = changed_keys(before, job.facts.config) + changed_keys(hashes, job.facts.data_hashes)
    if state.phase == "train" and any(line.startswith(PLANNED) and not line.startswith(MAY_CHANGE) for line in lines):
        return replace(state, step=0, loss_sum=0.0, loss_count=0)
    return state


def build_network(
    config: TrainJobConfig, classes: ClassList, gpu: bool, architecture: dict[str, Any] | None = None
) -> tuple[Detector, WeightsReport | None]:
    """On the CPU, with the weights that a run begins with, its parts frozen as asked for.

    Args:
        gpu: whether it will be trained on one.
        architecture: as a checkpoint has it, whose weights are loaded later.

    Raises:
        UserError: there is no such model or part, weights that do not fit, or it is asked for what needs a GPU.
    """
    if config.train.sync_batch_norm and not gpu:
        raise UserError("train.sync_batch_norm needs GPUs")
    detector, weights = build_detector(config.model, classes, padding=config.data.padding, architecture=architecture)
    freeze(detector, config.model.freeze)
    return detector, weights


def _detector(job: Job, runtime: Runtime, checkpoint: Checkpoint | None) -> Detector:
    """On its device, in training mode, with its parts as the configuration wants them."""
    config = job.config
    architecture = checkpoint.content["architecture"] if checkpoint else None
    detector, weights = build_network(config, job.facts.classes, runtime.device.type == "cuda", architecture)
    if weights is not None and runtime.is_main:
        runtime.notify({"message": weights.table()})
    if checkpoint:
        if (names := checkpoint.classes.names) != (wanted := job.facts.classes.names):
            raise UserError(f"{job.run.uri} was trained on the classes {', '.join(names)}, not {', '.join(wanted)}")
        checkpoint.load_model(detector)
    if config.train.sync_batch_norm and runtime.group:
        sync_batch_norms(detector)
    detector.to(runtime.device).train()
    return detector


def _average(config: OptimConfig, detector: Detector, state: TrainState) -> Ema | None:
    if not config.ema_decay:
        return None
    return Ema(detector, config.ema_decay, config.ema_warmup_steps, state.global_step - state.skipped_steps)


def _goes_on(state: TrainState, world: int) -> str:
    where = {"train": "training", "validate": "validation", "test": "the test"}[state.phase]
    text = f"goes on from step {state.global_step}, with {where}"
    text += f" of epoch {state.epoch + 1}" if state.phase != "test" else ""
    return f"{text}, on {world} worker{'s' if world > 1 else ''}"


def _tracker(job: Job, runtime: Runtime, state: TrainState, keep_lines: int | None) -> Tracker:
    """What is logged. In wandb, which takes no step twice, each way back to a checkpoint begins another run."""
    config, again = job.config, f"-{state.rollbacks}" if state.rollbacks else ""
    return Tracker(
        runtime.folder,
        config.wandb,
        config.name + again,
        job.run_id + again,
        job.facts.config,
        keep_lines=keep_lines,
        patience_s=job.run.patience_s,
        publish=runtime.publish,
    )
