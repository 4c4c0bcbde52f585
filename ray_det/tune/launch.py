"""A sweep from its configuration to the best one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ray_det.cli import to_yaml
from ray_det.config import TrainJobConfig
from ray_det.report.sweep_page import sweep_page
from ray_det.report.sweep_trial import SweepTrial, winner
from ray_det.storage import Folder
from ray_det.tune.config import DEFAULT_TRIALS, TuneJobConfig
from ray_det.tune.proposals import fresh_trials, grid_size
from ray_det.tune.records import ranked, trials_csv, trials_table
from ray_det.tune.search import rule_of
from ray_det.tune.space import Domain, default_space, parse_domain, require_values, with_params
from ray_det.tune.trials import Trials, run_trials
from ray_det.types import TrainingError

BEST, TABLE, PAGE = "best.yaml", "trials.csv", "sweep.html"


def sweep(config: TuneJobConfig, *, say: Callable[[str], None] = print) -> None:
    """Run, or go on with, the sweep that the configuration names, and report it.

    Raises:
        Stopped: SIGINT or SIGTERM came; the trials have checkpoints.
        UserError: an input that the user can put right.
        TrainingError: no trial got as far as to be evaluated.
    """
    space, base = space_of(config), config.base()
    count = _number_of_trials(config, space)
    facts = config.model_dump(mode="json", exclude={"space"})

    trials = Trials(
        kind="sweep",
        base=base,
        count=count,
        concurrent=config.tune.concurrent,
        facts=facts | {"space": {name: str(domain) for name, domain in space.items()}},
        may_change=("tune.trials", "tune.concurrent"),
        fresh=partial(fresh_trials, config.tune.search, space, base.seed, count),
        rule=partial(rule_of, config.tune, base.train.epochs),
    )
    say(f"space: {'; '.join(f'{name} {domain}' for name, domain in space.items())}")
    run_trials(trials, say, lambda known, _: _report(base, space, known, trials.folder, say))


def space_of(config: TuneJobConfig) -> dict[str, Domain]:
    """What is searched: what was asked for, or else learning rate and weight decay.

    Raises:
        UserError: a domain that is none, or with values that its field does not take.
    """
    base = config.base()
    asked = {name: parse_domain(text, f"--space.{name}") for name, text in config.asked_space().items()}
    space = asked or default_space(base, grid=config.tune.search == "grid")
    require_values(base, space)
    return space


def _number_of_trials(config: TuneJobConfig, space: dict[str, Domain]) -> int:
    asked = config.tune.trials
    if config.tune.search == "grid":
        return min(grid_size(space), asked or grid_size(space))
    return asked or DEFAULT_TRIALS


def _report(
    base: TrainJobConfig,
    space: dict[str, Domain],
    trials: list[SweepTrial],
    folder: Folder,
    say: Callable[[str], None],
) -> None:
    """Write the table, the page and the best configuration."""
    best = winner(trials)
    folder.write_text(TABLE, trials_csv(trials))
    logs = [name for name, domain in space.items() if domain.kind == "loguniform"]
    folder.write_text(PAGE, sweep_page(base.name, ranked(trials), list(space), logs, best))
    say(trials_table(trials))
    if best is None:
        raise TrainingError(f"no trial was evaluated; see {folder.uri}/{TABLE}")
    folder.write_text(BEST, to_yaml(best_config(base, best)))
    say(f"best: {best.name}, {', '.join(f'{name} {value}' for name, value in best.params.items())}")
    say(f"python jobs/train.py --config {folder.uri}/{BEST}   (and open {PAGE} beside it)")


def best_config(base: TrainJobConfig, best: SweepTrial) -> TrainJobConfig:
    """What `jobs/train.py --config` takes to train the best trial once more, as a run of its own."""
    place = {"name": f"{base.name}-best", "overwrite": False, "allow_changes": False}
    return with_params(base, best.params).model_copy(update=place)
