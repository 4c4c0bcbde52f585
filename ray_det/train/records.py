"""What rank 0 records and tells of training: a record per step, lines for whoever watches."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from ray_det.data.plan import EpochPlan
from ray_det.train.session import Session
from ray_det.train.step import StepResult


def log_step(
    session: Session, plan: EpochPlan, result: StepResult, rate: float, *, seconds: float, wait: float
) -> None:
    clock, state, images = session.clock, session.state, session.config.train.global_batch_size
    if clock.first_step_at is None:
        clock.first_step_at = time.time()  # its time is the start-up's, not training's
    else:
        clock.train_s, clock.wait_s, clock.images = clock.train_s + seconds, clock.wait_s + wait, clock.images + images
    session.runtime.publish({"step_s": seconds, "data_wait_share": wait / seconds})
    if not session.tracker:
        return
    record: dict[str, Any] = {
        "train/batch_loss": result.loss,
        "train/epoch": state.epoch,
        "train/learning_rate": rate,
        **_other_rates(session),
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
    notify(session, "training", step=state.step, steps=plan.steps, loss=result.loss, lr=rate)


def _other_rates(session: Session) -> dict[str, float]:
    """The backbone's, where it has its own."""
    scaled = [group["lr"] for group in session.optimizer.param_groups if group.get("lr_scale", 1) != 1]
    return {"train/backbone_learning_rate": scaled[0]} if scaled else {}


def epoch_update(session: Session, record: dict[str, float], done: int, better: bool) -> dict[str, Any]:
    """What the driver is told of an epoch: a line, and what a sweep goes by, read back from the optimizer."""
    main, config, state = session.optimizer.param_groups[0], session.config, session.state
    line = epoch_line(record, done, config.train.epochs, better)
    if done < config.train.epochs and state.gives_up(config, done):
        line += f"  no better val/AP in {config.train.patience} epochs: the run ends"
    ended = {
        "epoch": done,
        "step": state.global_step - 1,
        "steps_per_epoch": int(record["global_step"]) // done,
        "AP": record.get("val/AP"),
        "lr": main["lr"] / main["lr_scale"],
        "weight_decay": main["weight_decay"],
        "rollbacks": state.rollbacks,
    }
    return {"message": line, "epoch_end": ended}


def epoch_line(record: dict[str, float], done: int, epochs: int, better: bool) -> str:
    line = f"epoch {done}/{epochs}: loss {record['train/epoch_avg_loss']:.4f}"
    if "val/AP" in record:
        line += f"  val/loss {record['val/loss']:.4f}  val/AP {record['val/AP']:.4f}  val/AP50 {record['val/AP50']:.4f}"
    return line + ("  best" if better else "")


def announce(session: Session, plan: EpochPlan) -> None:
    """Say once what the plan makes of the data."""
    if session.state.epoch or not session.runtime.is_main:
        return
    number, size = plan.rows_SMB.shape[1:]
    text = f"{plan.steps} steps per epoch, {number} x {size} images each"
    if (sampling := session.config.data.sampling) != "uniform":
        different = len(np.unique(plan.rows_SMB))
        text += f"; {sampling} sampling of {session.job.manifests['train'].counts['trainable_images']} images"
        text += f", {different} of which are in the first epoch"
    if plan.wrapped:
        text += f"; {plan.wrapped} places of an epoch's last batch are filled with images that were seen before"
    if plan.dropped:
        text += f"; {plan.dropped} images are left out of each epoch (data.last_batch: drop)"
    session.runtime.notify({"message": text})


def notify(session: Session, phase: str, **more: Any) -> None:
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
