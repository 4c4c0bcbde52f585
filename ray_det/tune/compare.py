"""A comparison: the same training with single changes, each with several seeds, and what each change is worth."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from ray.tune.schedulers import FIFOScheduler

from ray_det.data.manifest import Manifest
from ray_det.evaluate.bootstrap import ap_of_samples, difference
from ray_det.evaluate.detections_file import FILE, read_detections
from ray_det.evaluate.results import Results
from ray_det.report.compare_arm import ArmReport, ArmRun, Difference
from ray_det.report.compare_page import compare_page, figures, text_table
from ray_det.report.metrics_file import kind_of, read_records
from ray_det.report.stability import stability_of
from ray_det.report.sweep_trial import SweepTrial
from ray_det.storage import Folder
from ray_det.tune.arms import REFERENCE, Arm, parse_arms, points_of
from ray_det.tune.config import CompareJobConfig
from ray_det.tune.proposals import fresh_points
from ray_det.tune.trials import Trials, run_trials
from ray_det.types import TrainingError

TABLE, PAGE = "comparison.csv", "compare.html"


def compare(config: CompareJobConfig, *, say: Callable[[str], None] = print) -> None:
    """Run, or go on with, the comparison that the configuration names, and report it.

    Raises:
        Stopped: SIGINT or SIGTERM came; the runs have checkpoints.
        UserError: an input that the user can put right.
        TrainingError: no run of the reference came to its end.
    """
    base, options = config.base(), config.compare
    arms = parse_arms(base, options.arms)
    points = points_of(arms, range(base.seed, base.seed + options.seeds))

    trials = Trials(
        kind="comparison",
        base=base,
        count=len(points),
        concurrent=options.concurrent,
        facts=config.model_dump(mode="json"),
        may_change=("compare.",),
        fresh=partial(fresh_points, points),
        rule=FIFOScheduler,
    )
    for arm in arms:
        say(f"{arm.name}: {', '.join(f'{name} {value}' for name, value in arm.params.items()) or 'without changes'}")

    def report(known: list[SweepTrial], manifests: dict[str, Manifest]) -> None:
        reports = _reports(arms, known, trials.folder, manifests.get("test"), options.resamples)
        trials.folder.write_text(TABLE, _csv(reports))
        trials.folder.write_text(PAGE, compare_page(base.name, reports))
        say(text_table(reports))
        say(f"{trials.folder.uri}/{PAGE}")
        if not reports[0].finished:
            raise TrainingError(f"no run of the reference came to its end; see {trials.folder.uri}/{TABLE}")

    run_trials(trials, say, report)


def _reports(
    arms: Sequence[Arm], trials: Sequence[SweepTrial], folder: Folder, test: Manifest | None, samples: int
) -> list[ArmReport]:
    """The reference first, then as they were asked for."""
    runs = {arm.name: tuple(_run(trial, folder) for trial in trials if _is_of(trial, arm)) for arm in arms}
    aps = _aps_on_samples([trial for trial in trials if trial.state == "finished"], folder, test, samples)
    reference = {run.seed: run.trial for run in runs[REFERENCE]}
    return [
        ArmReport(arm.name, arm.params, runs[arm.name], _difference(runs[arm.name], reference, aps) if i else None)
        for i, arm in enumerate(arms)
    ]


def _is_of(trial: SweepTrial, arm: Arm) -> bool:
    return {name: value for name, value in trial.params.items() if name != "seed"} == arm.params


def _run(trial: SweepTrial, folder: Folder) -> ArmRun:
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "metrics.jsonl"
        if (folder / trial.name).exists(path.name):
            (folder / trial.name).download(path, path.name)
        steps = tuple(record for record in read_records(path) if kind_of(record) == "step")
    return ArmRun(trial.params["seed"], trial, steps, stability_of(steps))


def _aps_on_samples(
    trials: Sequence[SweepTrial], folder: Folder, test: Manifest | None, samples: int
) -> dict[int, np.ndarray]:
    """(S,) AP on the same samples of the test images, by number of the trial."""
    known = [trial for trial in trials if (folder / trial.name).exists(FILE)] if test else []
    if test is None or not known:
        return {}
    found = ap_of_samples(test, [_detections(folder / trial.name, test) for trial in known], samples)
    return {trial.number: found[:, i] for i, trial in enumerate(known)}


def _detections(run: Folder, test: Manifest) -> Results:
    with TemporaryDirectory() as scratch:
        run.download(Path(scratch) / FILE, FILE)
        return read_detections(Path(scratch) / FILE, test)


def _difference(
    runs: Sequence[ArmRun], reference: dict[int, SweepTrial], aps: dict[int, np.ndarray]
) -> Difference | None:
    """Over the seeds with which both came to their end."""
    pairs = [(reference[run.seed], run.trial) for run in runs if run.seed in reference]
    pairs = [(a, b) for a, b in pairs if a.number in aps and b.number in aps]
    if not pairs:
        return None
    a_SR, b_SR = (np.stack([aps[pair[side].number] for pair in pairs], axis=1) for side in (0, 1))
    mean = float(np.mean([(b.test_ap or 0.0) - (a.test_ap or 0.0) for a, b in pairs]))
    return Difference(*difference(a_SR, b_SR, mean))


def _csv(reports: Sequence[ArmReport]) -> str:
    """One row per arm."""
    rows = [figures(report) for report in reports]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
