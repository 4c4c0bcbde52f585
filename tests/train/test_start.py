"""What a start makes of a run folder: nothing is lost, claimed or changed before all is known to be right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from yaml import safe_load

from ray_det.config import TrainJobConfig
from ray_det.data.headers import map_in_threads
from ray_det.train.checkpoint import Checkpoint
from ray_det.train.job import Job
from ray_det.train.launch import goes_on
from ray_det.train.start import begin, claim
from ray_det.tune.trial import require_effective
from ray_det.types import UserError
from tests.jobs.run import run_job
from tests.train import runner
from tests.train.disturb import config, write
from tests.train.runner import records, run_alone
from tests.train.test_equivalence import STEPS, spec


def asked_for(small_coco: dict[str, Path], storage: Path, **more: Any) -> TrainJobConfig:
    return TrainJobConfig.model_validate(config(small_coco, storage) | more)


def start(asked: TrainJobConfig) -> Job:
    job = begin(asked, 0.0, lambda text: None, map_in_threads)
    claim(job)
    return job


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def trained(small_coco, tmp_path) -> Path:
    """The folder of a run that has a step behind it."""
    start(asked_for(small_coco, tmp_path))
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    return tmp_path / "run"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "job, wrong",
    [
        ("train", "--data.train"),
        ("train", "--workers.num"),
        ("train", "--model.name"),
        ("train", "--train.sync_batch_norm"),
        ("tune", "--data.val"),
        ("tune", "--model.freeze"),
    ],
)
def test_what_is_overwritten_stays_until_all_is_right(job, wrong, small_coco, trained, tmp_path, capfd):
    """Data that is not there; more workers or GPUs than there is room for; no such model, or part of it."""
    asked: dict[str, Any] = config(small_coco, tmp_path) | {"overwrite": True}
    if wrong == "--workers.num":
        asked |= {"workers": {"num": 2, "cpus": 500}}
    elif wrong == "--model.name":
        asked["model"] = {"name": "torchvision/fcos_resnet51_fpn"}
    elif wrong == "--train.sync_batch_norm":
        asked["train"] |= {"sync_batch_norm": True}
    elif wrong == "--model.freeze":
        asked["model"] |= {"freeze": ["bakbone"]}
    else:
        asked["data"][wrong.rpartition(".")[2]] = str(tmp_path / "trian.json")
    if job == "tune":
        (trained / "sweep.json").write_text("{}")
    before = content(trained)
    assert run_job(job, "--config", write(asked, tmp_path / "asked")) == 2
    said = capfd.readouterr().err.strip()
    assert content(trained) == before, said
    near = {"--model.name": "did you mean resnet50", "--model.freeze": "backbone"}
    near |= {"--train.sync_batch_norm": "needs GPUs"}
    assert near.get(wrong, "") in said and len(said.splitlines()) == 1


def test_to_overwrite_is_not_part_of_a_run(small_coco, trained, tmp_path):
    """Its config.yaml is for going on."""
    start(asked_for(small_coco, tmp_path, overwrite=True, optim={"lr": 0.5}))
    assert not (trained / "metrics.jsonl").exists()
    kept = safe_load((trained / "config.yaml").read_text())
    assert kept["optim"]["lr"] == 0.5 and not kept["overwrite"] and not kept["allow_changes"]
    (trained / "metrics.jsonl").write_text("{}\n")
    start(TrainJobConfig.model_validate(kept))
    assert (trained / "metrics.jsonl").exists()


def test_a_stopped_run_says_what_goes_on(small_coco, tmp_path):
    for overwrite, words in ((False, "the same command goes on"), (True, "command without --overwrite goes on")):
        asked = asked_for(small_coco, tmp_path, overwrite=overwrite)
        job = begin(asked, 0.0, lambda text: None, map_in_threads)
        assert words in goes_on(job.config, job.run)


def test_what_ended_before_its_first_step_claims_nothing(small_coco, tmp_path):
    first = start(asked_for(small_coco, tmp_path))
    assert start(asked_for(small_coco, tmp_path)).run_id == first.run_id
    second = start(asked_for(small_coco, tmp_path, optim={"lr": 0.5}))
    assert second.run_id != first.run_id
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["optim"]["lr"] == 0.5


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoint_00000005_train"])
def test_a_run_with_steps_refuses_another_configuration(left, small_coco, trained, tmp_path):
    (trained / "metrics.jsonl").rename(trained / left)
    before = content(trained)
    with pytest.raises(UserError, match=r"another configuration \(.*optim.lr: .* -> 0.5\)"):
        start(asked_for(small_coco, tmp_path, optim={"lr": 0.5}))
    assert content(trained) == before
    start(asked_for(small_coco, tmp_path, optim={"lr": 0.5}, allow_changes=True))


@pytest.mark.parametrize("key", ["model", "classes"])
def test_no_option_makes_it_another_network(key, small_coco, trained, tmp_path):
    asked = config(small_coco, tmp_path)
    if key == "model":
        asked["model"]["fpn_channels"] = 128
    else:
        asked["data"]["classes"] = ["disc"]
    changed = TrainJobConfig.model_validate(asked | {"allow_changes": True})
    with pytest.raises(
        UserError, match=r"of another network or of other classes \((model.fpn_channels|data.classes): "
    ):
        start(changed)


@pytest.mark.parametrize("file", ["sweep.json", "comparison.json"])
def test_the_folder_of_a_sweep_is_not_a_runs(file, small_coco, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text("{}")
    with pytest.raises(UserError, match="holds a (sweep|comparison): choose another --name"):
        start(asked_for(small_coco, tmp_path))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file]


def test_a_storage_that_cannot_be_written_is_one_line(small_coco, tmp_path):
    (tmp_path / "file").write_text("")
    for storage in ("/proc/nope", str(tmp_path / "file" / "runs")):
        with pytest.raises(UserError, match=f"--storage {storage} cannot be written: "):
            start(asked_for(small_coco, Path(storage)))


def test_a_val_without_objects_is_told(small_coco, tmp_path):
    empty = json.loads(small_coco["val"].read_text()) | {"annotations": []}
    (tmp_path / "val.json").write_text(json.dumps(empty))
    asked, said = config(small_coco, tmp_path), []
    for annotated in (True, False):
        begin(TrainJobConfig.model_validate(asked), 0.0, said.append, map_in_threads)
        assert any("val has no object, so val/AP says nothing" in line for line in said) is not annotated
        images = {"val": str(tmp_path / "val.json"), "images": str(small_coco["val"].parent / "images")}
        asked |= {"data": asked["data"] | images}


def go_on(small_coco: dict[str, Path], tmp_path: Path, checkpoint: str, **changes: dict[str, Any]) -> Path:
    """A run of two epochs, and from one of its checkpoints another with changed options."""
    asked = spec(small_coco, tmp_path, "fcos", epochs=2, lr=1e-3)
    asked["config"] |= {"optim": {"lr": 1e-3, "interval": "step", "warmup_steps": 0}, "allow_changes": True}
    asked["config"]["train"]["checkpoint_every_steps"] = 1
    first = run_alone(asked)
    (tmp_path / "again" / "run").mkdir(parents=True)
    for name in ("metrics.jsonl", "run.json"):
        shutil.copy(first / name, tmp_path / "again" / "run")
    for section, values in changes.items():
        asked["config"][section] |= values
    asked["config"]["storage"] = str(tmp_path / "again")
    return run_alone(asked | {"checkpoint": str(first / "kept" / checkpoint)})


def test_changed_rates_and_decays_are_those_of_the_optimizer(small_coco, tmp_path):
    run = go_on(small_coco, tmp_path, "checkpoint_00000003_validate", optim={"weight_decay": 0.5})
    for kept in (run / "kept").iterdir():
        groups = torch.load(kept / "optimizer.pt", weights_only=True)["param_groups"]
        assert [group["weight_decay"] for group in groups] == [0.5]


def test_who_goes_on_with_a_validation_tells_the_rate_of_the_last_step(small_coco, tmp_path, monkeypatch):
    """By which a sweep sees that a trial's rate is what the trial stands for."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(runner, "_tell", lambda folder, update: told.append(update))
    run = go_on(small_coco, tmp_path, "checkpoint_00000003_validate")
    ended = [update["epoch_end"] for update in told if "epoch_end" in update]
    assert len(ended) == 4 and ended[2] == ended[0]  # of the run, and of that which goes on
    asked = TrainJobConfig.model_validate_json(json.dumps(json.loads((run / "run.json").read_text())["config"]))
    for one in ended:
        require_effective(asked, one)


def test_parameters_that_no_longer_decay_are_refused_by_name(small_coco, tmp_path):
    with pytest.raises(UserError, match="has other groups of parameters: what is frozen, what decays"):
        go_on(small_coco, tmp_path, "checkpoint_00000003_validate", optim={"decay_norms_and_biases": False})


def test_an_epoch_whose_plan_has_changed_begins_anew(small_coco, tmp_path):
    """With half the global batch, in the second epoch: its learning rates are those of the second of two epochs."""
    run = go_on(small_coco, tmp_path, "checkpoint_00000005_train", train={"global_batch_size": 3})
    steps = [r for r in records(run) if "train/batch_loss" in r]
    assert [r["global_step"] for r in steps] == list(range(1, 6 + 2 * STEPS))
    rates = [r["train/learning_rate"] for r in steps[5:]]
    assert rates[0] == pytest.approx(5e-4, rel=1e-2) and rates == sorted(rates, reverse=True) and rates[-1] < 3e-5
    assert Checkpoint.open(max((run / "kept").glob("*_test"))).state.epoch == 2
    assert (
        "goes on from step 5, with training of epoch 2, on 1 worker, which begins anew"
        in (run / "messages.txt").read_text()
    )


def test_the_rest_of_an_epoch_is_done_where_its_plan_is_the_same(small_coco, tmp_path):
    run = go_on(small_coco, tmp_path, "checkpoint_00000005_train", optim={"lr": 2e-3})
    assert [r["global_step"] for r in records(run) if "train/batch_loss" in r] == list(range(1, 2 * STEPS + 1))
    assert "begins anew" not in (run / "messages.txt").read_text()


def test_data_of_other_classes_is_refused_by_their_names(small_coco, tmp_path):
    data = {"images": str(small_coco["train"].parent / "images")}
    for split, path in small_coco.items():
        renamed = json.loads(path.read_text())
        renamed["categories"][0]["name"] = "ring"
        (tmp_path / f"{split}.json").write_text(json.dumps(renamed))
        data[split] = str(tmp_path / f"{split}.json")
    with pytest.raises(UserError, match=r"was trained on the classes disc, .*, not ring, "):
        go_on(small_coco, tmp_path, "checkpoint_00000003_validate", data=data)
