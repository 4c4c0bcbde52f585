"""`jobs/bench.py step` on its smallest case: every figure compares what it says it does."""

from __future__ import annotations

import pytest

from ray_det import cli
from ray_det.bench import checkpoint, step
from ray_det.train import loop
from tests.models.zoo import FAMILIES


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (step.Config, {"name": "torchvision/fcos_mobilenet_v3_small_fpn", "weights": "none", "fpn_channels": 64}),
        (checkpoint.Config, {"name": "torchvision/retinanet_resnet18_fpn", "weights": "none", "fpn_channels": 256}),
    ],
    ids=["step", "checkpoint"],
)
def test_defaults_of_the_model_are_those_of_help_and_stay_where_another_field_is_named(capsys, config, expected):
    told = cli.parse(config, ["--model.freeze", "backbone"], description="")[0].model
    assert {name: getattr(told, name) for name in expected} == expected and told.freeze == ("backbone",)
    assert cli.parse(config, [], description="")[0].model.model_dump() == told.model_dump() | {"freeze": ()}
    with pytest.raises(SystemExit):
        cli.parse(config, ["--help"], description="")
    words = " ".join(capsys.readouterr().out.split())
    for name, value in expected.items():
        assert f"[default: {value}]" in words.partition(f"--model.{name} ")[2].partition(" --")[0], name


@pytest.mark.usefixtures("threads")
@pytest.mark.slow
def test_every_figure(monkeypatch):
    ours, bare = [], []
    monkeypatch.setattr(loop, "train_step", _counting(loop.train_step, ours))
    monkeypatch.setattr(step, "bare_step", _counting(step.bare_step, bare))
    small = {
        "model": FAMILIES["fcos"].model_dump(),
        "image_size": 96,
        "batch_size": 2,
        "steps": 2,
        "repeats": 1,
        "threads": 1,
    }
    chosen = ("loop", "tail", "precision", "ranks")
    config = step.Config.model_validate(small | {"wandb": "disabled", "figures": chosen})
    figures = {}
    for figure in step.run(config):
        figures[figure.figure] = figure
        if figure.figure == "step, with all of the loop":
            assert len(ours) == 3 * config.steps and len(bare) == 2 * config.steps  # once more to load the batches
    assert [f.arm for f in figures.values()] == ["ray_det", "foreach and fused", "bf16", "2 workers"]
    assert all(f.value > 0 and f.peer_value and f.ratio for f in figures.values())
    tail = figures["clip, AdamW and EMA"].settings
    assert tail["tensors"] > 100 and tail["parameters"] > 10**5


def _counting(function, calls: list):
    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return counted
