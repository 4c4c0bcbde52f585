"""The end of an epoch: its weights are validated, its record is logged, the best weights are kept.

That happens at once, or in the background (`eval.background`) while the next epoch trains: then the epoch's checkpoint
is evaluated elsewhere, and what comes of it is taken before the last step of the next epoch, at the same step in
every run, however long it took. The last epoch has nothing beside it and is validated at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from ray_det.evaluate.gather import from_main
from ray_det.train.evaluation import evaluate_split
from ray_det.train.records import epoch_update, notify
from ray_det.train.session import Session
from ray_det.train.skipped import note_in_evaluation
from ray_det.train.step import sync_buffers
from ray_det.train.store import name_of
from ray_det.types import UserError

LOOK_S = 0.2
"""Seconds between looks whether a validation in the background has ended."""


def validated(session: Session) -> Literal["nowhere", "here", "in the background"]:
    """Where the current epoch is to be validated."""
    done, config = session.state.epoch + 1, session.config
    last = done == config.train.epochs
    if "val" not in session.job.manifests or not (last or done % config.eval.every_epochs == 0):
        return "nowhere"
    return "in the background" if config.eval.background and not last else "here"


def end_epoch(session: Session) -> None:
    """Validate, or begin to, and go to the next epoch; all ranks call it."""
    config, record, where = session.config, _record(session), validated(session)
    if where == "here":
        notify(session, "validating")
        metrics = evaluate_split(session, "val", pictures=config.eval.pictures)
        _log(session, record, metrics, session.save_best)
    elif where == "in the background":
        sync_buffers(session.evaluated)  # as every validation does
        session.state = replace(session.state, validating=record)
        validate_in_background(session)
    else:
        _log(session, record, None, session.save_best)
    if session.state.epoch + 1 == config.train.epochs and session.state.best_ap is None:  # no val, or no object in it
        session.save_best()
    session.state = session.state.next_epoch()


def validate_in_background(session: Session) -> None:
    """Begin to validate the epoch of `state.validating`, if there is one, once its checkpoint is kept.

    Raises:
        UserError: the run goes on without what validates in the background.
    """
    record, validate = session.state.validating, session.runtime.validate
    if record is None or not session.runtime.is_main:
        return
    if validate is None:
        raise UserError("an epoch's validation in the background had not ended: go on with --eval.background true")
    name = _checkpoint_of(record)

    def begin() -> None:
        session.validation = validate(name)

    session.writer.then(begin)


def collect(session: Session) -> None:
    """Wait for the validation in the background, if there is one, and log its epoch; all ranks call it."""
    record, runtime = session.state.validating, session.runtime
    if record is None:
        return
    session.at("checkpoint")
    session.writer.wait()  # it begins the validation
    while not from_main(session.validation is not None and session.validation.done(), runtime.group):
        session.at("waiting for the validation of the epoch before")
        time.sleep(LOOK_S)
    evaluated = session.validation.result() if session.validation else None
    step = int(record["global_step"])
    note_in_evaluation(session, "val", evaluated.skipped if evaluated else [], step)
    metrics = from_main(evaluated and evaluated.metrics, runtime.group)
    if session.tracker and evaluated:
        names = list(session.job.manifests["val"].classes.distinct_names)
        session.tracker.log_pictures(step, evaluated.pictures, names)
    session.state, session.validation = replace(session.state, validating=None), None
    if metrics is None and runtime.is_main:
        runtime.notify({"message": f"{_checkpoint_of(record)} is broken: its epoch stays without validation"})
    _log(session, record, metrics, partial(session.promote, _checkpoint_of(record)))


def _checkpoint_of(record: dict[str, float]) -> str:
    return name_of(int(record["global_step"]), "validate")


def _record(session: Session) -> dict[str, float]:
    """Of the epoch that just ended."""
    state = session.state
    record: dict[str, float] = {
        "global_step": state.global_step,
        "train/epoch": state.epoch,
        "train/epoch_avg_loss": state.loss_sum / max(state.loss_count, 1),
        "learning_rate": session.learning_rate(state.step),
    }
    if session.profile:
        record |= {f"profile/{name}": value for name, value in session.profile.items()}
        session.profile.clear()
    return record


def _log(
    session: Session, record: dict[str, float], metrics: dict[str, float] | None, keep: Callable[[], None]
) -> None:
    """Log an epoch's record, and keep its weights if they are the best.

    Args:
        metrics: of val; None: it was not validated.
        keep: makes the weights `best`.
    """
    step, done = int(record["global_step"]), int(record["train/epoch"]) + 1
    ap = metrics["AP"] if metrics else None
    record = record | {f"val/{name}": value for name, value in (metrics or {}).items()}
    if session.tracker:
        session.tracker.log_epoch(step, record)
    best = session.state.best_ap
    better = ap is not None and ap >= 0 and (best is None or ap > best)  # below: there is no object to find
    if better:
        session.state = replace(session.state, best_ap=ap, best_step=step, best_epoch=done)
        keep()
    if session.runtime.is_main:
        session.runtime.notify(epoch_update(session, record, done, better))
