"""What a sweep's folder tells of its trials."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from ray_det.report.sweep_trial import SweepTrial, winner
from ray_det.storage import Folder
from ray_det.tune.records import read_trials, trials_csv, trials_table, write_trial
from ray_det.tune.trial import value_of


def log(folder: Path, aps: list[float | None]) -> None:
    lines = [json.dumps({"global_step": 1, "train/batch_loss": 3.0, "train/epoch": 0})]
    for i, ap in enumerate(aps):
        record = {"global_step": 4 * i + 4, "train/epoch": i, "train/epoch_avg_loss": 1.0}
        lines.append(json.dumps(record | ({} if ap is None else {"val/AP": ap})))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"torn": ')


def plant(sweep: Path) -> Folder:
    folder = Folder.at(str(sweep))
    write_trial(folder, SweepTrial(0, {"optim.lr": 1e-3}, "finished", seconds=62.4))
    write_trial(folder, SweepTrial(1, {"optim.lr": 1e-5}, "stopped"))
    write_trial(folder, SweepTrial(2, {"optim.lr": 9.0}, "failed", error="TrainingError: not finite"))
    write_trial(folder, SweepTrial(10, {"optim.lr": 2e-3}, "running"))
    log(sweep / "trial_000", [None, 0.2, None, 0.4])
    log(sweep / "trial_001", [0.9])
    log(sweep / "trial_010", [0.3])
    (sweep / "trial_000" / "summary.json").write_text('{"test/AP": 0.35}')
    (sweep / "trial_099").mkdir()  # killed before it wrote anything
    (sweep / "other").mkdir()
    return folder


def test_trials_are_read_with_curve_and_test(tmp_path):
    trials = read_trials(plant(tmp_path))
    assert [trial.number for trial in trials] == [0, 1, 2, 10]
    first = trials[0]
    assert first.curve == ((2, 0.2), (4, 0.4)) and first.test_ap == 0.35 and first.seconds == 62.4
    assert [trial.ended for trial in trials] == [True, True, True, False]


def test_one_that_was_through_when_it_was_killed_has_finished(tmp_path):
    folder = plant(tmp_path)
    (tmp_path / "trial_010" / "summary.json").write_text('{"test/AP": 0.2}')
    assert read_trials(folder)[3].state == "finished"


def test_the_winner_was_trained_to_its_end(tmp_path):
    trials = read_trials(plant(tmp_path))
    best = winner(trials)
    assert best and best.number == 0
    assert winner(trials[1:3]) == trials[1] and winner([]) is None


def test_what_a_proposer_is_told(tmp_path):
    folder = plant(tmp_path)
    assert [value_of(folder, number) for number in (0, 1, 2, 10, 99)] == [0.4, 0.9, 0.0, None, None]


def test_the_table_has_the_best_first(tmp_path):
    trials = read_trials(plant(tmp_path))
    rows = list(csv.DictReader(trials_csv(trials).splitlines()))
    assert [row["trial"] for row in rows] == ["trial_001", "trial_000", "trial_010", "trial_002"]
    assert rows[1] == {
        "trial": "trial_000",
        "state": "finished",
        "optim.lr": "0.001",
        "epochs": "4",
        "val/AP": "0.4",
        "test/AP": "0.35",
        "seconds": "62",
        "error": "",
    }
    assert "TrainingError: not finite" in trials_table(trials).splitlines()[-1]
    assert trials_table([]) == "no trials"


def test_the_table_of_trials_of_two_spaces_has_the_fields_of_both():
    params = ({"optim.lr": 1e-3}, {"optim.lr": 1e-4, "seed": 3}, {"seed": 4})
    trials = [SweepTrial(i, one, "finished", ((1, 0.1 * i),)) for i, one in enumerate(params)]
    rows = list(csv.DictReader(trials_csv(trials).splitlines()))
    assert list(rows[0]) == ["trial", "state", "optim.lr", "seed", "epochs", "val/AP", "test/AP", "seconds", "error"]
    assert [(row["optim.lr"], row["seed"]) for row in rows] == [("", "4"), ("0.0001", "3"), ("0.001", "")]
    assert [line.split()[2:4] for line in trials_table(trials).splitlines()[1:]] == [
        ["-", "4"],
        ["0.0001", "3"],
        ["0.001", "-"],
    ]
