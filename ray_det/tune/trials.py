"""Trials of one training run, told or drawn: the data is prepared once, and what is left of them runs or goes on."""

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
from ray.tune.schedulers import TrialScheduler

from ray_det.cluster import Room
from ray_det.config import TrainJobConfig, changed_keys
from ray_det.data.manifest import Manifest
from ray_det.data.ray_map import map_chunks
from ray_det.report.sweep_trial import SweepTrial
from ray_det.storage import Folder
from ray_det.train.launch import POLL_S, STOP_GRACE_S, goes_on, signals
from ray_det.train.lock import hold
from ray_det.train.rehearsal import require_model
from ray_det.train.start import MAY_CHANGE, prepare_splits, require_kind, with_embedded_data
from ray_det.tune.desk import start_desk
from ray_det.tune.proposals import Proposer
from ray_det.tune.records import read_trials
from ray_det.tune.room import make_room, start_for
from ray_det.tune.search import Line, Politely, run_tuner
from ray_det.tune.trial import Shared, value_of
from ray_det.types import Stopped, UserError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trials:
    """What is to be run."""

    kind: str  # "sweep" or "comparison": `<kind>.json` in the folder says what it is
    base: TrainJobConfig  # which the trials vary
    count: int
    concurrent: int | None  # most at the same time
    facts: dict[str, Any]  # what it is beside its data, in JSON
    may_change: tuple[str, ...]  # beginnings of the facts' dotted keys with which it may go on differently
    fresh: Callable[
        [list[SweepTrial]], tuple[list[int], Proposer]
    ]  # of the known: numbers of further ones, their values
    rule: Callable[[], TrialScheduler]  # when a trial is stopped

    @property
    def folder(self) -> Folder:
        return Folder.at(self.base.storage, self.base.workers.storage_timeout_s) / self.base.name


def run_trials(trials: Trials, say: Say, report: Callable[[list[SweepTrial], dict[str, Manifest]], None]) -> None:
    """Run, or go on with, all of them, and have them reported, with the manifests by split.

    Raises:
        Stopped: SIGINT or SIGTERM came; the trials have checkpoints.
        UserError: an input that the user can put right.
    """
    threading.Thread(target=importlib.import_module, args=("ray.train.torch",), daemon=True).start()
    base, folder = trials.base, trials.folder
    with hold(Folder.at(base.storage, base.workers.storage_timeout_s), base.name, say):
        base = base.model_copy(update={"data": with_embedded_data(base, say)})
        if base.data.val is None:
            raise UserError(f"a {trials.kind} compares trials by val/AP: it needs --data.val")
        if base.eval.background:
            raise UserError(f"--eval.background: the trials of a {trials.kind} validate in their own workers")
        connect = partial(start_for, base.workers, trials.concurrent or trials.count)
        manifests = prepare_splits(base, say, partial(map_chunks, connect=connect))
        facts = trials.facts | {"data_hashes": {split: manifest.hash for split, manifest in manifests.items()}}
        known = [] if base.overwrite else _known(trials, facts)
        numbers, proposer = trials.fresh(known)
        if not numbers and all(trial.ended for trial in known):
            say(f"{trials.kind} {base.name} is finished: {folder.uri}")
        else:
            left = sum(not trial.ended for trial in known) + len(numbers)
            at_once, room = make_room(base.workers, min(left, trials.concurrent or left))
            if base.overwrite and folder.names():
                require_model(base, manifests["train"].classes, room.gpu)
                folder.delete()
            folder.write_text(f"{trials.kind}.json", json.dumps(facts, indent=1))
            _run(trials, base, known, numbers, proposer, manifests, (at_once, room), say)
        report(read_trials(folder), manifests)


def _known(trials: Trials, facts: dict[str, Any]) -> list[SweepTrial]:
    """The trials of an earlier start.

    Raises:
        UserError: they are of something else.
    """
    folder, name = trials.folder, f"{trials.kind}.json"
    require_kind(folder, name)
    if folder.exists(name) and not trials.base.allow_changes:
        allowed = (*MAY_CHANGE, *trials.may_change)
        lines = [line for line in changed_keys(folder.read_json(name), facts) if not line.startswith(allowed)]
        if lines:
            raise UserError(
                f"{folder.uri} holds a {trials.kind} with another configuration ({'; '.join(lines)}): "
                "choose another --name, or --overwrite it, or go on with --allow_changes"
            )
    return read_trials(folder)


def _run(
    trials: Trials,
    base: TrainJobConfig,
    known: list[SweepTrial],
    numbers: list[int],
    proposer: Proposer,
    manifests: dict[str, Manifest],
    given: tuple[int, Room],
    say: Say,
) -> None:
    """Run what is left of the trials.

    Args:
        given: how many at a time, and what each of their workers gets.
    """
    folder, workers, (at_once, room) = trials.folder, base.workers, given
    interrupted = [trial for trial in known if not trial.ended]
    left = len(interrupted) + len(numbers)
    if known:
        say(f"goes on: {len(known) - len(interrupted)} trials have ended, {len(interrupted)} were interrupted")
    say(f"{left} trials to run, {at_once} at a time, with {workers.least} workers each")
    for trial in known:
        value = value_of(folder, trial.number)
        if value is not None:
            proposer.tell(trial.number, trial.params, value)
    desk = start_desk()
    shared = Shared(base, folder, {split: ray.put(manifest) for split, manifest in manifests.items()}, room, desk)
    line = Line(proposer, interrupted, numbers, partial(value_of, folder))
    scheduler = Politely(trials.rule(), lambda name: ray.get(desk.stop.remote(name)), known)
    retries = workers.max_failures
    run = partial(run_tuner, line, scheduler, shared, trials=left, at_once=at_once, retries=retries)
    _follow(run, line, desk, goes_on(base, folder), say)


def _follow(run: Callable[[], None], line: Line, desk: Any, ending: str, say: Say) -> None:
    """Run the tuner in another thread, and print here what the trials tell: the main thread gets the signals.

    Args:
        ending: what is said where one stopped it.
    """
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
        raise Stopped(ending, got[0])
    if errors:
        raise errors[0]
