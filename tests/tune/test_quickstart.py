"""A sweep as a user would run it: the embedded data, ASHA, a kill on the way, and a winner that deserves it."""

from __future__ import annotations

import json
import signal
import statistics
import time
from pathlib import Path

import pytest

from ray_det.storage import Folder
from ray_det.tune.records import read_trials
from tests.jobs.run import run_job
from tests.tune.test_sweep import ended, lines, start, table

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
TRIALS, EPOCHS = 8, 9


def test_eight_trials_killed_once_have_a_winner_that_beats_the_median_on_test(tmp_path):
    folder = tmp_path / "sweep"
    options = ("--name", "sweep", "--storage", tmp_path, "--train.epochs", EPOCHS, "--eval.every_epochs", 1)
    options += ("--tune.trials", TRIALS, "--wandb.mode", "disabled", "--recipe", "quickstart")
    first = start(None, *options)
    while len(lines(folder)) < 4:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    output = ended(start(None, *options), timeout_s=900)
    assert "goes on:" in output
    rows = table(folder)
    states = [row["state"] for row in rows.values()]
    assert (
        len(rows) == TRIALS
        and "stopped" in states
        and "finished" in states
        and set(states)
        <= {
            "stopped",
            "finished",
        }
    )
    trials = sorted(read_trials(Folder.at(str(folder))), key=lambda trial: trial.best_ap or 0.0)
    best = next(row for row in rows.values() if row["test/AP"])
    aps = [ap_on_test(folder, tmp_path, trial.name) for trial in trials]
    assert float(best["test/AP"]) > statistics.median(aps)


def ap_on_test(folder: Path, scratch: Path, trial: str) -> float:
    output = scratch / "evaluated" / trial
    data = scratch / ".cache" / "embedded" / "test.json"
    assert run_job("eval", "--checkpoint", folder / trial, "--data.val", data, "--output", output) == 0
    return json.loads((output / "summary.json").read_text())["val/AP"]
