"""How a trial ends, with a training run that is made up."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from ray_det.cluster import Room
from ray_det.config import TrainJobConfig
from ray_det.data.headers import map_in_threads
from ray_det.storage import Folder
from ray_det.train.start import prepare_splits
from ray_det.tune import trial as module
from ray_det.tune.desk import BY_SCHEDULER, Desk
from ray_det.tune.trial import Shared, run_trial
from ray_det.types import Stopped, TrainingError

ENDED = {"epoch": 1, "step": 7, "steps_per_epoch": 8, "AP": 0.25, "lr": 1e-3, "weight_decay": 1e-4, "rollbacks": 0}


class Remote:
    """An actor's handle, whose methods answer at once."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


class Gone:
    def tell(self, line: str) -> None:
        raise RayActorError


@pytest.fixture
def run(small_coco, tmp_path, monkeypatch):
    """Runs trial 3 with a `fit`; -> what trial.json says, and what was reported."""
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "ray", SimpleNamespace(get=lambda value: value))
    monkeypatch.setattr(module, "tune", SimpleNamespace(report=reported.append))
    data = {split: str(path) for split, path in small_coco.items()}
    base = TrainJobConfig.model_validate({"name": "sweep", "storage": str(tmp_path), "data": data})
    manifests: Any = prepare_splits(base, lambda text: None, map_in_threads)

    def run(fit: Any, desk: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        monkeypatch.setattr(module, "fit", fit)
        shared = Shared(base, Folder.at(str(tmp_path / "sweep")), manifests, Room(False, 1.0, 1, False), Remote(desk))
        run_trial({"number": 3, "params": {"optim.lr": 1e-3}}, shared=shared)
        return json.loads((tmp_path / "sweep" / "trial_003" / "trial.json").read_text()), reported

    return run


def test_a_trial_reports_the_epochs_that_were_evaluated(run):
    def fit(job, room, manifests, show, asked, *, grace_s):
        assert (job.config.optim.lr, job.config.wandb.group, job.config.name) == (1e-3, "sweep", "trial_003")
        assert asked() == 0
        show({"phase": "training"})
        show({"message": "epoch 1/24", "epoch_end": ENDED | {"AP": None}})
        show({"message": "epoch 1/24 again", "epoch_end": ENDED})

    desk = Desk()
    record, reported = run(fit, desk)
    assert (record["state"], record["params"], record["error"]) == ("finished", {"optim.lr": 1e-3}, "")
    assert reported == [{"epoch": 1, "val/AP": 0.25, "trial": "trial_003"}]
    assert desk.take() == ["trial_003: epoch 1/24", "trial_003: epoch 1/24 again"]


def test_a_trial_that_trains_with_another_learning_rate_has_failed(run):
    def fit(job, room, manifests, show, asked, *, grace_s):
        show({"message": "epoch 1/24", "epoch_end": ENDED | {"lr": 9e-4}})

    record, reported = run(fit, Desk())
    assert record["state"] == "failed" and "in the optimizer" in record["error"] and reported == []


@pytest.mark.parametrize(("by", "state"), [(BY_SCHEDULER, "stopped"), (2, "running")])
def test_a_stop_by_the_scheduler_is_an_end_and_one_by_a_signal_is_not(run, by, state):
    desk = Desk()
    if by == BY_SCHEDULER:
        desk.stop("trial_003")
    desk.stop_all(2)

    def fit(job, room, manifests, show, asked, *, grace_s):
        raise Stopped("", asked())

    assert run(fit, desk)[0]["state"] == state


def test_a_failure_is_a_result_but_not_at_the_end_of_the_sweep(run, tmp_path):
    def fit(*_, **__):
        raise TrainingError("loss is not finite\nin 5 steps")

    record, _ = run(fit, Desk())
    assert (record["state"], record["error"]) == ("failed", "TrainingError: loss is not finite in 5 steps")
    with pytest.raises(RayActorError):
        run(fit, Gone())
    assert json.loads((tmp_path / "sweep" / "trial_003" / "trial.json").read_text())["state"] == "running"
