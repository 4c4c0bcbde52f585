"""The configuration: the documented defaults, the recipes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ray_det import cli, recipes
from ray_det.config import TrainConfig, TrainJobConfig, changed_keys, micro_batches


def test_the_defaults_are_the_documented_recipe() -> None:
    config = TrainJobConfig.model_validate({})
    optim = config.optim
    assert (optim.lr, optim.lr_min, optim.weight_decay, optim.clip_norm) == (5e-5, 1e-6, 1e-4, 1.0)
    assert (optim.schedule, optim.interval, optim.warmup_steps) == ("cosine", "epoch", 0)
    assert (config.data.padding, config.data.image_size, config.data.resize) == ("mean", 640, "longest")
    assert (config.storage, config.wandb.mode, config.workers.use_gpu) == ("./runs", "auto", None)


RECIPES: dict[str, dict[str, Any]] = {
    "finetune": {},
    "baseline": {
        "data": {"padding": "zero", "window": 1},
        "optim": {"lr": 1e-4, "weight_decay": 1e-2, "schedule": "constant", "clip_norm": 0.0},
    },
    "from_imagenet": {
        "data": {"image_size": 320},
        "model": {"name": "torchvision/fcos_mobilenet_v2_fpn", "fpn_channels": 128},
        "optim": {"lr": 5e-4, "warmup_steps": 50},
        "train": {"epochs": 12, "global_batch_size": 8},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_changes(name: str) -> None:
    config, recipe = cli.parse(TrainJobConfig, ["--recipe", name], description="", recipes=True)
    assert recipe == name
    assert config == TrainJobConfig.model_validate(RECIPES[name])


def test_quickstart_needs_neither_data_nor_a_download() -> None:
    config, _ = cli.parse(TrainJobConfig, ["--recipe", "quickstart"], description="", recipes=True)
    assert config.name == "quickstart"
    assert (config.data.train, config.data.val, config.data.test) == (None, None, None)
    assert config.model.weights == "none"
    assert config.model.name.startswith("torchvision/")


def test_every_recipe_says_what_it_is_for() -> None:
    assert recipes.names() == ["baseline", "finetune", "from_imagenet", "quickstart"]
    assert all(recipes.text(name).startswith("# ") for name in recipes.names())


@pytest.mark.parametrize(
    ("total", "micro", "workers", "expected"),
    [(16, None, 1, (1, 16)), (16, None, 4, (4, 4)), (16, 2, 4, (8, 2)), (8, 8, 1, (1, 8)), (6, 1, 3, (6, 1))],
)
def test_micro_batches(total: int, micro: int | None, workers: int, expected: tuple[int, int]) -> None:
    train = TrainConfig.model_validate({"global_batch_size": total, "micro_batch_size": micro})
    assert micro_batches(train, workers) == expected


@pytest.mark.parametrize(
    ("total", "micro", "workers", "message"),
    [
        (16, None, 3, "train.global_batch_size 16 is not divisible by workers.num 3"),
        (16, 5, 1, "train.global_batch_size 16 is not divisible by train.micro_batch_size 5"),
        (16, 8, 4, "a global batch of 16 in micro-batches of 8 gives 2, not divisible by workers.num 4"),
    ],
)
def test_micro_batches_that_do_not_divide(total: int, micro: int | None, workers: int, message: str) -> None:
    train = {"global_batch_size": total, "micro_batch_size": micro}
    with pytest.raises(ValidationError) as caught:
        TrainJobConfig.model_validate({"train": train, "workers": {"num": workers}})
    assert message in str(caught.value)


def test_a_configuration_is_frozen() -> None:
    config = TrainJobConfig.model_validate({})
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrainJobConfig.model_validate({"optim": {"lrr": 1}})


def test_changed_keys() -> None:
    old = {"seed": 0, "optim": {"lr": 1.0, "clip": 1}, "model": {"config": {}}, "gone": None}
    new = {"seed": 0, "optim": {"lr": 2.0, "clip": 1}, "model": {"config": {"d": 4}}}
    assert changed_keys(old, new) == ["model.config.d: null -> 4", "optim.lr: 1.0 -> 2.0"]
    assert changed_keys(new, new) == []
