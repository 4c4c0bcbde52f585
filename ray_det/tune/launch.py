"""A sweep from its configuration to the best one: prepare once, run or go on with the trials, report."""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from ray_det.cli import to_yaml
from ray_det.config import TrainJobConfig, changed_keys
from ray_det.data.manifest import Manifest
from ray_det.data.pipeline import map_chunks
from ray_det.report.sweep_page import sweep_page
from ray_det.report.sweep_trial import SweepTrial, winner
from ray_det.storage import Folder
from ray_det.train.launch import POLL_S, STOP_GRACE_S, signals
from ray_det.train.lock import hold
from ray_det.train.start import MAY_CHANGE, prepare_splits, with_embedded_data
from ray_det.tune.config import DEFAULT_TRIALS, TuneJobConfig
from ray_det.tune.desk import start_desk
from ray_det.tune.proposals import build_proposer, grid_size
from ray_det.tune.records import ranked, read_trials, trials_csv, trials_table
from ray_det.tune.room import make_room, start_for
from ray_det.tune.search import Line, Politely, rule_of, run_tuner
from ray_det.tune.space import Domain, default_space, parse_domain, require_values, with_params
from ray_det.tune.trial import Shared, value_of
from ray_det.types import Stopped, TrainingError, UserError

FACTS, BEST, TABLE, PAGE = "sweep.json", "best.yaml", "trials.csv", "sweep.html"
CHANGES = (*MAY_CHANGE, "tune.trials", "tune.concurrent")
"""What a sweep may go on with differently."""


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was asked for."""

    config: TuneJobConfig
    space: dict[str, Domain]
    trials: int
    folder: Folder

    @property
    def base(self) -> TrainJobConfig:
        """The training run that the trials vary."""
        return self.config.base()

    def fresh(self, known: list[SweepTrial]) -> list[int]:
        """Numbers of trials that have not begun."""
        return sorted({*range(self.trials)} - {trial.number for trial in known})


def sweep(config: TuneJobConfig, *, say: Callable[[str], None] = print) -> SweepTrial:
    """Run, or go on with, the sweep that the configuration names -> its best trial.

    Raises:
        Stopped: SIGINT or SIGTERM came; the trials have checkpoints.
        UserError: an input that the user can put right.
        TrainingError: no trial got as far as to be evaluated.
    """
    threading.Thread(target=importlib.import_module, args=("ray.train.torch",), daemon=True).start()
    space = space_of(config)
    storage = Folder.at(config.storage, config.workers.storage_timeout_s)
    asked = Sweep(config, space, _number_of_trials(config, space), storage / config.name)
    with hold(storage, config.name, say):
        if config.overwrite:
            asked.folder.delete()
        data = with_embedded_data(config, say)
        if data.val is None:
            raise UserError("a sweep compares trials by val/AP: it needs --data.val")
        if asked.base.eval.background:
            raise UserError("--eval.background: the trials of a sweep validate in their own workers")
        base = asked.base.model_copy(update={"data": data})
        connect = partial(start_for, config.workers, config.tune.concurrent or asked.trials)
        manifests = prepare_splits(base, say, partial(map_chunks, connect=connect))
        _keep_facts(asked, manifests)
        say(f"space: {'; '.join(f'{name} {domain}' for name, domain in space.items())}")
        known = read_trials(asked.folder)
        if not asked.fresh(known) and all(trial.ended for trial in known):
            say(f"sweep {config.name} is finished: {asked.folder.uri}")
        else:
            _run(asked, base, known, manifests, say)
        return _report(asked, say)


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


def _keep_facts(asked: Sweep, manifests: dict[str, Manifest]) -> None:
    """Write down what the sweep is, or see that it is the same.

    Raises:
        UserError: it is not.
    """
    folder = asked.folder
    facts: dict[str, Any] = asked.config.model_dump(mode="json", exclude={"space"})
    facts |= {"space": {name: str(domain) for name, domain in asked.space.items()}}
    facts |= {"data_hashes": {split: manifest.hash for split, manifest in manifests.items()}}
    if folder.exists("run.json"):
        raise UserError(f"{folder.uri} holds a training run: choose another --name")
    if folder.exists(FACTS) and not asked.config.allow_changes:
        lines = [line for line in changed_keys(folder.read_json(FACTS), facts) if not line.startswith(CHANGES)]
        if lines:
            raise UserError(
                f"{folder.uri} holds a sweep with another configuration ({'; '.join(lines)}): "
                "choose another --name, or --overwrite it, or go on with --allow_changes"
            )
    folder.write_text(FACTS, json.dumps(facts, indent=1))


def _run(
    asked: Sweep,
    base: TrainJobConfig,
    known: list[SweepTrial],
    manifests: dict[str, Manifest],
    say: Callable[[str], None],
) -> None:
    """Run what is left of the trials."""
    folder, options, workers = asked.folder, asked.config.tune, base.workers
    interrupted = [trial for trial in known if not trial.ended]
    left = len(interrupted) + len(fresh := asked.fresh(known))
    at_once, room = make_room(workers, min(left, options.concurrent or left))
    if known:
        say(f"goes on: {len(known) - len(interrupted)} trials have ended, {len(interrupted)} were interrupted")
    say(f"{left} trials to run, {at_once} at a time, with {workers.least} workers each")
    proposer = build_proposer(options.search, asked.space, base.seed, len(known))
    for trial in known:
        value = value_of(folder, trial.number)
        if value is not None:
            proposer.tell(trial.number, trial.params, value)
    desk = start_desk()
    shared = Shared(base, folder, {split: ray.put(manifest) for split, manifest in manifests.items()}, room, desk)
    line = Line(proposer, interrupted, fresh, partial(value_of, folder))
    rule = rule_of(options, base.train.epochs)
    scheduler = Politely(rule, lambda name: ray.get(desk.stop.remote(name)), known)
    retries = workers.max_failures
    _follow(
        partial(run_tuner, line, scheduler, shared, trials=left, at_once=at_once, retries=retries),
        line,
        desk,
        folder,
        say,
    )


def _follow(run: Callable[[], None], line: Line, desk: Any, folder: Folder, say: Callable[[str], None]) -> None:
    """Run the tuner in another thread, and print here what the trials tell: the main thread gets the signals."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    deadline = None
    with signals() as got:
        while thread.is_alive() and (deadline is None or time.monotonic() < deadline):
            thread.join(POLL_S)
            if got and deadline is None:
                deadline = time.monotonic() + STOP_GRACE_S
                line.close()
                desk.stop_all.remote(got[0])
                say("stopping the trials after a checkpoint of their step; a second signal stops at once")
            for text in ray.get(desk.take.remote()):
                say(text)
    if got:
        raise Stopped(f"the same command goes on: {folder.uri}", got[0])
    if errors:
        raise errors[0]


def _report(asked: Sweep, say: Callable[[str], None]) -> SweepTrial:
    """Write the table, the page and the best configuration."""
    folder, space = asked.folder, asked.space
    trials = read_trials(folder)
    best = winner(trials)
    folder.write_text(TABLE, trials_csv(trials))
    logs = [name for name, domain in space.items() if domain.kind == "loguniform"]
    folder.write_text(PAGE, sweep_page(asked.config.name, ranked(trials), list(space), logs, best))
    say(trials_table(trials))
    if best is None:
        raise TrainingError(f"no trial was evaluated; see {folder.uri}/{TABLE}")
    folder.write_text(BEST, to_yaml(best_config(asked.base, best)))
    say(f"best: {best.name}, {', '.join(f'{name} {value}' for name, value in best.params.items())}")
    say(f"python jobs/train.py --config {folder.uri}/{BEST}   (and open {PAGE} beside it)")
    return best


def best_config(base: TrainJobConfig, best: SweepTrial) -> TrainJobConfig:
    """What `jobs/train.py --config` takes to train the best trial once more, as a run of its own."""
    place = {"name": f"{base.name}-best", "overwrite": False, "allow_changes": False}
    return with_params(base, best.params).model_copy(update=place)
