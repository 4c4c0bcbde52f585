"""Arms from the command line, and a real comparison."""

from __future__ import annotations

import csv
from typing import Any

import pytest

from ray_det import cli
from ray_det.config import TrainJobConfig
from ray_det.tune.arms import REFERENCE, parse_arms, points_of
from ray_det.tune.config import CHANGES, CompareJobConfig
from ray_det.types import UserError
from tests.jobs.run import run_job
from tests.tune.test_sweep import config, write

BASE = TrainJobConfig()


def params(*texts: str) -> dict[str, dict[str, Any]]:
    return {arm.name: arm.params for arm in parse_arms(BASE, texts)}


def test_arms_are_changes_by_name_values_and_recipes():
    found = params("zero_padding", "wide: data.image_size=800 + optim.lr=1e-4", "optim.clip_norm=0", "baseline")
    assert found == {
        REFERENCE: {},
        "zero_padding": {"data.padding": "zero"},
        "wide": {"data.image_size": 800, "optim.lr": 1e-4},
        "optim.clip_norm=0": {"optim.clip_norm": 0},
        "baseline": {
            "data.padding": "zero",
            "data.window": 1,
            "optim.lr": 1e-4,
            "optim.weight_decay": 1e-2,
            "optim.schedule": "constant",
            "optim.clip_norm": 0,
        },
    }


def test_by_default_what_the_recipe_replaced_is_compared_part_by_part():
    asked, _ = cli.parse(CompareJobConfig, ["--recipe", "finetune"], description="", recipes=True)
    arms = parse_arms(asked.base(), asked.compare.arms)
    assert [arm.name for arm in arms] == [REFERENCE, *CHANGES, "baseline"]
    parts = {field for arm in arms[1:-1] for field in arm.params}
    assert parts == arms[-1].params.keys()
    points = points_of(arms, range(3))
    assert len(points) == 24 and len({tuple(point.items()) for point in points}) == 24
    assert points[8] == {"seed": 1}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["zero"], "'zero' is neither field=value nor one of zero_padding"),
        (["optim.lrr=1"], r"unknown field optim\.lrr; did you mean optim\.lr\?"),
        (["optim.lr=-1"], r"optim\.lr"),
        (["a: optim.lr=1", "a: optim.lr=2"], "two arms have the name 'a'"),
        (["optim.clip_norm=1.0"], "has the same values as reference"),
        (["seed=1"], "seed is the same for all arms"),
        (["train.epochs=2"], r"train\.epochs is the same for all arms"),
    ],
)
def test_what_is_no_arm_is_named(texts, message):
    with pytest.raises(UserError, match=message):
        parse_arms(BASE, texts)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_comparison_goes_on_with_further_arms_and_a_failed_run_is_a_result(small_coco, tmp_path, capfd):
    asked = config(small_coco, tmp_path / "runs", epochs=1)
    asked |= {"wandb": {"mode": "disabled"}, "compare": {"seeds": 2, "resamples": 20}}
    asked["train"]["max_nonfinite_steps"] = 2  # broken before there is anything to tell Ray Tune
    asked["workers"] |= {"cpus": 0.5, "max_failures": 0}  # a loader needs more than a worker has
    file, folder = write(asked), tmp_path / "runs" / "sweep"
    assert run_job("compare", "--config", file, "--compare.arms", "zero_padding") == 0
    written = {path: path.stat().st_mtime_ns for path in folder.glob("trial_*/metrics.jsonl")}
    assert len(written) == 4
    capfd.readouterr()
    assert run_job("compare", "--config", file, "--compare.arms", "zero_padding, broken: optim.lr=1e+30") == 0
    said = capfd.readouterr().out
    assert "4 trials have ended" in said and "2 trials to run" in said
    assert {path: path.stat().st_mtime_ns for path in written} == written
    rows = {row["arm"]: row for row in csv.DictReader((folder / "comparison.csv").read_text().splitlines())}
    assert [(row["finished"], row["runs"]) for row in rows.values()] == [("2", "2"), ("2", "2"), ("0", "2")]
    assert rows["zero_padding"]["test/AP_difference_low"] and not rows["broken"]["test/AP_difference"]
    assert int(float(rows["broken"]["nonfinite_steps"])) > 0
    assert "broken" in (folder / "compare.html").read_text()
    assert run_job("compare", "--config", file, "--optim.lr", 0.1) == 2
    assert "holds a comparison with another configuration (optim.lr" in capfd.readouterr().err
    assert run_job("tune", "--config", file) == 2
