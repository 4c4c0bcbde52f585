"""What a sweep's folder knows of its trials. It is all that a sweep needs to go on."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray_det.report.sweep_trial import SweepTrial, trial_name
from ray_det.storage import Folder

RECORD = "trial.json"
"""In a trial's run folder: its number, values, state and error."""


def write_trial(sweep: Folder, trial: SweepTrial) -> None:
    facts = {name: getattr(trial, name) for name in ("number", "params", "state", "seconds", "error")}
    (sweep / trial.name).write_text(RECORD, json.dumps(facts, indent=1))


def read_trials(sweep: Folder) -> list[SweepTrial]:
    """All that have begun, by number."""
    names = [name for name in sweep.names() if re.fullmatch(r"trial_\d{3,}", name)]
    found = [read_trial(sweep, int(name.removeprefix("trial_"))) for name in names]
    return sorted((trial for trial in found if trial), key=lambda trial: trial.number)


def read_trial(sweep: Folder, number: int) -> SweepTrial | None:
    """A trial with its curve and its test; None where it has not begun."""
    run = sweep / trial_name(number)
    if not run.exists(RECORD):
        return None
    trial = SweepTrial(**run.read_json(RECORD), curve=_curve(run))
    if not run.exists("summary.json"):
        return trial
    # Killed between its end and the record of it, or stopped by the scheduler when it had been through.
    state = "finished" if trial.state != "failed" else trial.state
    return replace(trial, state=state, test_ap=run.read_json("summary.json").get("test/AP"))


def _curve(run: Folder) -> tuple[tuple[int, float], ...]:
    """(epochs done, val/AP) of the run's log; an epoch that was evaluated again counts once."""
    curve: dict[int, float] = {}
    lines = run.read_text("metrics.jsonl").splitlines() if run.exists("metrics.jsonl") else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if record.get("val/AP") is not None and "train/epoch_avg_loss" in record:
            curve[int(record["train/epoch"]) + 1] = float(record["val/AP"])
    return tuple(sorted(curve.items()))


def trials_csv(trials: Sequence[SweepTrial]) -> str:
    """One row per trial, best first."""
    rows = _rows(trials)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["trial"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def trials_table(trials: Sequence[SweepTrial]) -> str:
    """The same for a terminal."""
    rows = [{name: _cell(value) for name, value in row.items()} for row in _rows(trials)]
    if not rows:
        return "no trials"
    widths = {name: max(len(name), *(len(line[name]) for line in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, *rows]
    return "\n".join("  ".join(line[name].ljust(width) for name, width in widths.items()).rstrip() for line in lines)


def ranked(trials: Sequence[SweepTrial]) -> list[SweepTrial]:
    """Best first; those without a number last."""
    return sorted(trials, key=lambda trial: -1.0 if trial.best_ap is None else trial.best_ap, reverse=True)


def _rows(trials: Sequence[SweepTrial]) -> list[dict[str, Any]]:
    """Best first. A field is None for a trial of a space that had it not."""
    fields = {name: None for trial in sorted(trials, key=lambda trial: trial.number) for name in trial.params}
    return [_row(trial, fields | trial.params) for trial in ranked(trials)]


def _row(trial: SweepTrial, params: dict[str, Any]) -> dict[str, Any]:
    return {
        "trial": trial.name,
        "state": trial.state,
        **params,
        "epochs": trial.epochs,
        "val/AP": trial.best_ap,
        "test/AP": trial.test_ap,
        "seconds": None if trial.seconds is None else round(trial.seconds),
        "error": trial.error,
    }


def _cell(value: Any) -> str:
    text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"
