"""One trial: a training run in the sweep's folder, followed by a function that Ray Tune runs.

It tells Tune of every epoch, and ends by itself when it is asked to: its workers keep a checkpoint and finish wandb,
and only then Tune takes its place for free. (Tune itself would take it at once, and kill what is left at the end.)
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.train.v2.api.exceptions import WorkerGroupError

from ray_det.cluster import Room
from ray_det.config import TrainJobConfig
from ray_det.connect import prepare_environment
from ray_det.data.manifest import Manifest
from ray_det.report.sweep_trial import SweepTrial, trial_name
from ray_det.storage import Folder
from ray_det.train.launch import fit
from ray_det.train.optim import learning_rate
from ray_det.train.restarts import failures_in_short
from ray_det.train.start import claim, open_run
from ray_det.tune.desk import BY_SCHEDULER
from ray_det.tune.records import read_trial, write_trial
from ray_det.tune.space import Params, with_params
from ray_det.types import Stopped, TrainingError

METRIC, TIME = "val/AP", "epoch"


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common."""

    base: TrainJobConfig
    sweep: Folder
    manifests: dict[str, ray.ObjectRef[Manifest]]  # by split: prepared once, in the object store
    room: Room
    desk: Any


def trial_config(base: TrainJobConfig, sweep: Folder, number: int, params: Params) -> TrainJobConfig:
    """A run of its own in the sweep's folder, and in wandb's group of the sweep."""
    wandb = base.wandb.model_copy(update={"group": base.wandb.group or base.name})
    place = {"name": trial_name(number), "storage": sweep.uri, "overwrite": False, "wandb": wandb}
    return with_params(base, params).model_copy(update=place)


def run_trial(point: dict[str, Any], *, shared: Shared) -> None:
    """Train a trial to its end, from the beginning or from its checkpoint, and write down how it ended.

    Whatever ends it is its result, and is not raised.

    Args:
        point: number and params of the trial.
    """
    prepare_environment()  # this is a process of Ray's
    trial = SweepTrial(point["number"], point["params"], "running")
    write_trial(shared.sweep, trial)
    began = time.monotonic()
    try:
        _train(trial, shared)
        trial = replace(trial, state="finished")
    except Stopped as stopped:
        trial = replace(trial, state="stopped" if stopped.signal_number == BY_SCHEDULER else "running")
    except Exception as error:
        trial = replace(trial, state="failed", error=in_short(error))
        # Without a desk this is the end of the sweep, which takes its trials with it in any order: no result.
        ray.get(shared.desk.tell.remote(f"{trial.name}: failed: {trial.error}"))
    write_trial(shared.sweep, replace(trial, seconds=time.monotonic() - began))


def _train(trial: SweepTrial, shared: Shared) -> None:
    config = trial_config(shared.base, shared.sweep, trial.number, trial.params)
    manifests = {split: ray.get(reference) for split, reference in shared.manifests.items()}
    job = open_run(config, manifests, time.time())
    claim(job)

    def show(update: dict[str, Any]) -> None:
        if "message" in update:
            shared.desk.tell.remote(f"{trial.name}: {update['message']}")
        if ended := update.get("epoch_end"):
            require_effective(job.config, ended)
            if ended["AP"] is not None:  # returns when the scheduler has decided
                tune.report({TIME: ended["epoch"], METRIC: ended["AP"], "trial": trial.name})

    fit(
        job,
        shared.room,
        shared.manifests,
        show,
        lambda: ray.get(shared.desk.asked.remote(trial.name)),
        grace_s=math.inf,
    )


def require_effective(config: TrainJobConfig, ended: dict[str, Any]) -> None:
    """See that a trial's optimizer has the learning rate and the weight decay that the trial stands for.

    Args:
        ended: what the optimizer of rank 0 says after an epoch; see `records.epoch_update`.

    Raises:
        TrainingError: it has others.
    """
    rate = learning_rate(config.optim, ended["step"], ended["steps_per_epoch"], config.train.epochs)
    rate *= config.train.rollback_lr_factor ** ended["rollbacks"]
    wanted, got = (rate, config.optim.weight_decay), (ended["lr"], ended["weight_decay"])
    if not all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-15) for a, b in zip(wanted, got, strict=True)):
        raise TrainingError(f"learning rate and weight decay are {got} in the optimizer, and {wanted} by the options")


def in_short(error: Exception) -> str:
    """One line, with the workers' own errors where Ray Train wraps them."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else None
    text = failures_in_short(failures) if failures else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]


def value_of(sweep: Folder, number: int) -> float | None:
    """What a proposer is told of a trial that has ended: its best val/AP, and 0 where it failed; None: not ended."""
    trial = read_trial(sweep, number)
    if trial is None or not trial.ended:
        return None
    return 0.0 if trial.state == "failed" else trial.best_ap
