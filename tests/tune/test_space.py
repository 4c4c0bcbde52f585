"""What is searched, from the command line to the values of a trial."""

from __future__ import annotations

import numpy as np
import pytest

from ray_det import cli
from ray_det.config import TrainJobConfig
from ray_det.report.sweep_trial import SweepTrial
from ray_det.storage import Folder
from ray_det.tune.config import TuneJobConfig
from ray_det.tune.launch import best_config, space_of
from ray_det.tune.proposals import Random, Tpe, fresh_trials, grid, grid_size
from ray_det.tune.space import Domain, default_space, parse_domain, with_params
from ray_det.tune.trial import require_effective, trial_config
from ray_det.types import TrainingError, UserError

SPACE = {
    "optim.lr": Domain("loguniform", (1e-5, 1e-2)),
    "augment.flip": Domain("uniform", (0.0, 0.5)),
    "seed": Domain("randint", (1, 3)),
    "data.padding": Domain("choice", ("mean", "zero")),
}


def parsed(*argv: str) -> TuneJobConfig:
    return cli.parse(TuneJobConfig, argv, description="", recipes=True)[0]


def test_domains_are_read_and_written_back():
    texts = ["loguniform(1e-05, 0.001)", "uniform(0.0, 0.5)", "randint(1, 3)", "choice(mean, zero)"]
    domains = [parse_domain(text, "x") for text in texts]
    assert [str(domain) for domain in domains] == texts
    assert parse_domain("choice(1, 2.5, true)", "x").values == (1, 2.5, True)
    assert parse_domain(" uniform( 0,1 ) ", "x").values == (0.0, 1.0)


@pytest.mark.parametrize(
    "text",
    ["1e-4", "gauss(0, 1)", "uniform(0)", "uniform(1, 0)", "loguniform(0, 1)", "randint(0, 1.5)", "choice()"]
    + ["uniform(a, b)", "uniform(0, .inf)", "choice(1, [)"],
)
def test_what_is_no_domain_is_named_with_its_option(text):
    with pytest.raises(UserError, match=r"^--space\.optim\.lr: "):
        parse_domain(text, "--space.optim.lr")


def test_any_field_can_be_searched_by_its_option():
    config = parsed("--space.optim.lr", "loguniform(1e-5,1e-3)", "--space.data.padding", "choice(mean, zero)")
    space = space_of(config)
    assert {name: str(domain) for name, domain in space.items()} == {
        "data.padding": "choice(mean, zero)",
        "optim.lr": "loguniform(1e-05, 0.001)",
    }
    assert config.base() == TrainJobConfig()


def test_wrong_options_are_named(capsys):
    with pytest.raises(UserError, match=r"did you mean --space\.optim\.lr\?"):
        parsed("--space.optim.lrr", "uniform(0, 1)")
    with pytest.raises(UserError, match="unknown option"):
        parsed("--space.data.train", "choice(a, b)")
    with pytest.raises(UserError, match="password in a URI"):
        parsed("--storage", "s3://me:secret@bucket/runs")
    config = parsed("--space.optim.lr", "uniform(-1, 1)")
    with pytest.raises(UserError, match=r"--space\.optim\.lr uniform\(-1\.0, 1\.0\): -1\.0 is no value"):
        space_of(config)
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert "--space.optim.weight_decay" in text and "--tune.scheduler" in text and "--workers.num" in text


def test_learning_rate_and_weight_decay_are_searched_out_of_the_box():
    config = parsed("--recipe", "quickstart")
    space = space_of(config)
    assert {name: domain.kind for name, domain in space.items()} == dict.fromkeys(
        ("optim.lr", "optim.weight_decay"), "loguniform"
    )
    assert space["optim.lr"].values == pytest.approx((2e-4, 2e-2))
    assert grid_size(default_space(config.base(), grid=True)) == 9


def test_a_trials_values_depend_on_seed_and_number_alone():
    one, other = Random(SPACE, seed=3), Random(SPACE, seed=3)
    other.tell(0, one.propose(0), 0.5)
    points = [one.propose(number) for number in range(200)]
    assert other.propose(7) == points[7] != Random(SPACE, seed=4).propose(7)
    rates = np.array([point["optim.lr"] for point in points])
    assert 1e-5 <= rates.min() and rates.max() <= 1e-2
    assert 0.4 < (rates < 10**-3.5).mean() < 0.6  # half of them in the lower half of the logarithms
    assert {point["seed"] for point in points} == {1, 2, 3}
    assert {point["data.padding"] for point in points} == {"mean", "zero"}
    assert all(float(f"{rate:.4g}") == rate for rate in rates)


def test_a_grid_has_every_combination_once():
    space = {"seed": Domain("choice", (1, 2, 3)), "data.padding": Domain("choice", ("mean", "zero"))}
    points = {tuple(point.values()) for point in grid(space)}
    assert len(points) == grid_size(space) == 6
    with pytest.raises(UserError, match="a grid takes choice"):
        grid_size(SPACE)


def test_optuna_learns_from_the_trials_before_and_does_not_repeat_them():
    space = SPACE | {"augment.scale": Domain("choice", ([0.9, 1.3], [1.0, 1.0]))}
    told = Tpe(space, seed=0, known=0)
    for number in range(40):
        point = told.propose(number)
        assert set(point) == set(space) and point["augment.scale"] in ([0.9, 1.3], [1.0, 1.0])
        told.tell(number, point, -abs(np.log10(point["optim.lr"]) + 4))  # best at 1e-4
    late = [told.propose(40 + number)["optim.lr"] for number in range(20)]
    assert np.mean(np.abs(np.log10(late) + 4)) < 0.5  # of draws: 0.83
    known = [SweepTrial(number, {}, "finished") for number in range(3)]
    (one, first), (other, then) = (fresh_trials("optuna", SPACE, 0, 5, had) for had in ([], known))
    assert (one, other) == ([0, 1, 2, 3, 4], [3, 4])
    assert first.propose(3) != then.propose(3)


def test_optuna_passes_over_the_trials_of_another_space():
    outside = [
        {"optim.lr": 1e-3, "data.padding": "black"},  # no choice
        {"optim.lr": 1.0, "data.padding": "mean"},  # beyond the bounds
        {"optim.lr": 1e-3},  # a field less
        {"optim.lr": 1e-3, "data.padding": "mean", "seed": 1},  # a field more
    ]
    space = {name: SPACE[name] for name in ("optim.lr", "data.padding")}
    told, untold = Tpe(space, 0, 4), Tpe(space, 0, 4)
    for number, params in enumerate(outside):
        told.tell(number, params, 0.5)
    assert told.propose(4) == untold.propose(4)
    told.tell(4, {"optim.lr": 1e-3, "data.padding": "mean"}, 0.5)
    assert [trial.value for trial in told._study.get_trials() if trial.value is not None] == [0.5]


def test_a_grid_that_has_grown_runs_what_is_new_and_numbers_it_on():
    padding = Domain("choice", ("mean", "zero"))
    before = {"seed": Domain("choice", (1, 2)), "data.padding": padding}
    known = [SweepTrial(number, point, "finished") for number, point in enumerate(grid(before))]
    assert fresh_trials("grid", before, 0, 4, known)[0] == []
    assert fresh_trials("grid", before, 0, 4, known[1:3])[0] == [3, 4]
    space = {"seed": Domain("choice", (3, 1)), "data.padding": padding}
    numbers, proposer = fresh_trials("grid", space, 0, 4, known)
    assert numbers == [4, 5]
    assert [proposer.propose(number) for number in numbers] == [
        {"seed": 3, "data.padding": "mean"},
        {"seed": 3, "data.padding": "zero"},
    ]
    numbers, proposer = fresh_trials("grid", {"data.padding": padding}, 0, 2, known)  # a field less
    assert numbers == [4, 5] and proposer.propose(5) == {"data.padding": "zero"}


def test_a_trial_is_a_run_of_its_own_with_its_values():
    base = TrainJobConfig.model_validate({"name": "sweep", "overwrite": True})
    config = trial_config(base, Folder.at("/x/sweep"), 7, {"optim.lr": 1e-3, "augment.scale": [1.0, 1.0]})
    assert (config.name, config.storage, config.wandb.group) == ("trial_007", "/x/sweep", "sweep")
    assert config.optim.lr == 1e-3 and config.augment.scale == (1.0, 1.0) and not config.overwrite
    with pytest.raises(UserError, match="optim.lr"):
        with_params(base, {"optim.lr": "much"})


def test_the_best_configuration_is_one_that_train_takes(tmp_path):
    base = TrainJobConfig.model_validate({"name": "sweep", "wandb": {"project": "p"}})
    best = SweepTrial(3, {"optim.lr": 3.217e-4, "data.padding": "zero"}, "finished")
    (tmp_path / "best.yaml").write_text(cli.to_yaml(best_config(base, best)))
    again, _ = cli.parse(TrainJobConfig, ["--config", str(tmp_path / "best.yaml")], description="", recipes=True)
    assert again == best_config(base, best)
    assert (again.name, again.optim.lr, again.data.padding) == ("sweep-best", 3.217e-4, "zero")


def test_another_learning_rate_or_weight_decay_in_the_optimizer_is_noticed():
    config = TrainJobConfig.model_validate({"optim": {"lr": 1e-3, "lr_min": 0, "weight_decay": 0.05}})
    half = {
        "epoch": 13,
        "step": 129,
        "steps_per_epoch": 10,
        "rollbacks": 0,
        "lr": 5e-4,
        "weight_decay": 0.05,
    }  # of 24 epochs
    require_effective(config, half)
    require_effective(config, half | {"rollbacks": 1, "lr": 2.5e-4})
    for wrong in ({"lr": 1e-3}, {"weight_decay": 1e-4}):
        with pytest.raises(TrainingError, match="in the optimizer"):
            require_effective(config, half | wrong)
