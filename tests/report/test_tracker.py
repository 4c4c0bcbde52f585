"""The tracker against real wandb: offline files are read back after finishing, and after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from ray_det.config import WandbConfig
from ray_det.report.metrics_file import MetricsFile, read_records
from ray_det.report.pictures import Picture
from ray_det.report.tracker import Tracker
from ray_det.report.wandb_log import read_history, sent_before
from ray_det.report.wandb_run import WandbRun


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No account, no prompt, no service left behind."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [n for n in os.environ if n.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def start(folder: Path, mode="offline", keep_lines=None) -> Tracker:
    config = WandbConfig.model_validate(dict(mode=mode, project="proj", group="grp"))
    return Tracker(folder, config, "name", "id0", {"seed": 3}, keep_lines=keep_lines)


def train(tracker: Tracker, first: int, last: int, steps: int = 5) -> None:
    """Steps first..last, all written; every `steps`-th ends an epoch."""
    for k in range(first, last + 1):
        epoch = (k - 1) // steps
        tracker.log_step(k, {"train/batch_loss": 1 / k, "train/epoch": epoch, "train/learning_rate": 5e-5})
        if k % steps == 0:
            tracker.log_epoch(
                k, {"train/epoch": epoch, "train/epoch_avg_loss": 2 / k, "learning_rate": 1e-6, "val/AP": k / 100}
            )
    tracker.flush()


def rows(folder: Path) -> list[dict]:
    files = sorted(folder.glob("wandb/*run-*/*.wandb"))
    assert files
    return [row for file in files for row in read_history(file)]


def steps(rows: list[dict]) -> list[int]:
    return [row["_step"] for row in rows if "train/batch_loss" in row]


def epochs(rows: list[dict]) -> list[tuple[int, float]]:
    return [(row["global_step"], row["val/AP"]) for row in rows if "val/AP" in row]


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("ray_det")]


def test_every_record_is_in_wandb_once_under_its_exact_name(tmp_path):
    tracker = start(tmp_path)
    train(tracker, 1, 10)
    tracker.log_test(10, {"test/AP": 0.5})
    tracker.finish()
    tracker.finish()
    got = rows(tmp_path)
    assert [r["_step"] for r in got] == list(range(1, 11))
    for k, row in enumerate(got, start=1):
        assert row["train/batch_loss"] == 1 / k
        assert row["train/learning_rate"] == 5e-5
        assert row["train/epoch"] == (k - 1) // 5
        assert ("val/AP" in row) == (k % 5 == 0)
    assert epochs(got) == [(5, 0.05), (10, 0.1)]
    assert [got[4][key] for key in ("learning_rate", "train/epoch_avg_loss")] == [1e-6, 0.4]
    assert (got[9]["test/AP"], got[9]["global_step"]) == (0.5, 10)
    lines = list(read_records(tmp_path / "metrics.jsonl"))
    assert [r["global_step"] for r in lines] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 10]
    assert tracker.lines == 13


def test_a_file_of_many_blocks_is_read_whole(tmp_path):
    """Records cross the edges of blocks of 32 KiB."""
    tracker = start(tmp_path)
    train(tracker, 1, 400)
    kept = tracker.lines
    tracker.finish()
    again = start(tmp_path, keep_lines=kept)
    train(again, 401, 405)
    again.finish()
    sizes = [file.stat().st_size for file in tmp_path.glob("wandb/offline-run-*-id0*/*.wandb")]
    assert max(sizes) > 3 * 32768
    assert steps(rows(tmp_path)) == list(range(1, 406))


def test_the_second_folder_of_a_second_counts(tmp_path):
    """Where two starts fall into one second, wandb puts -1 behind the second folder's name."""
    tracker = start(tmp_path)
    train(tracker, 1, 4)
    tracker.finish()
    folder = next(tmp_path.glob("wandb/offline-run-*-id0"))
    folder.rename(folder.with_name(folder.name + "-1"))
    sent = sent_before(tmp_path / "wandb", "id0")
    assert sent is not None
    assert sent.through == {"step": 4, "epoch": -1, "test": -1}


def test_wandb_own_reader_sees_the_same_and_the_axes(tmp_path):
    tracker = start(tmp_path)
    train(tracker, 1, 5)
    tracker.finish()
    file = next(tmp_path.glob("wandb/offline-run-*-id0/run-id0.wandb"))
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["history"]["item"]["_step"] for r in records if r["type"] == "history"] == [1, 2, 3, 4, 5]
    globs = {
        r["metric"].get("glob_name") or r["metric"].get("name"): r["metric"] for r in records if r["type"] == "metric"
    }
    for name in ("val/*", "test/*", "learning_rate", "train/epoch_avg_loss"):
        assert globs[name]["step_metric"] == "global_step"
    run = next(r["run"] for r in records if r["type"] == "run")
    assert (run["project"], run["run_group"], run["display_name"], run["run_id"]) == ("proj", "grp", "name", "id0")


def test_steps_done_again_after_a_restart_are_not_sent_again(tmp_path):
    tracker = start(tmp_path)
    train(tracker, 1, 5)
    kept = tracker.lines
    train(tracker, 6, 8)
    tracker.finish(1)
    again = start(tmp_path, keep_lines=kept)  # from the checkpoint of step 5
    assert again.lines == kept
    train(again, 6, 7)
    again.finish(1)
    last = start(tmp_path, keep_lines=kept)
    train(last, 6, 10)
    last.finish()
    assert steps(rows(tmp_path)) == list(range(1, 11))
    assert epochs(rows(tmp_path)) == [(5, 0.05), (10, 0.1)]
    written = list(read_records(tmp_path / "metrics.jsonl"))
    assert [r["global_step"] for r in written if "train/batch_loss" in r] == list(range(1, 11))


def test_a_restart_before_validation_sends_the_epoch_and_not_the_step(tmp_path):
    tracker = start(tmp_path)
    train(tracker, 1, 4)
    tracker.log_step(5, {"train/batch_loss": 0.2})
    tracker.flush()
    kept = tracker.lines
    tracker.finish(1)
    again = start(tmp_path, keep_lines=kept)
    again.log_epoch(5, {"val/AP": 0.05})
    train(again, 6, 10)
    again.finish()
    assert steps(rows(tmp_path)) == list(range(1, 11))
    assert epochs(rows(tmp_path)) == [(5, 0.05), (10, 0.1)]


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_tracker import start, train
tracker = start(Path({folder!r}))
train(tracker, 1, 7)
time.sleep(2.5)  # wandb writes these
train(tracker, 8, 12)
print(tracker.lines, flush=True)
time.sleep(60)
"""


def test_a_kill_loses_nothing_and_doubles_nothing(tmp_path):
    """wandb's service dies with the process and takes with it what it had not written; the next start sends that."""
    code = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    kept = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    time.sleep(0.5)
    survived = steps(rows(tmp_path))
    assert survived[:5] == [1, 2, 3, 4, 5]
    assert len(survived) < 12, "nothing was lost: the case is not tested"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 13, "train/ba')
    again = start(tmp_path, keep_lines=kept - 1)  # from the checkpoint of step 11
    train(again, 12, 15)
    again.finish()
    assert steps(rows(tmp_path)) == list(range(1, 16))
    assert epochs(rows(tmp_path)) == [(5, 0.05), (10, 0.1), (15, 0.15)]
    written = list(read_records(tmp_path / "metrics.jsonl"))
    assert [r["global_step"] for r in written if "train/batch_loss" in r] == list(range(1, 16))


class FakeRun:
    """A run that wandb's server knew, up to a step."""

    resumed, starting_step, summary = True, 8, {"global_step": 5, "val/AP": 0.05}

    def __init__(self):
        self.logged = []

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, row, step):
        self.logged.append((step, row))

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_online_the_server_says_what_it_has(tmp_path, monkeypatch):
    run = FakeRun()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr("ray_det.report.wandb_run._init", lambda mode, **start: run)
    known = [{"global_step": k, "train/batch_loss": 0.0} for k in range(1, 11)]
    wandb = WandbRun(tmp_path, WandbConfig.model_validate(dict(mode="auto")), "name", "id0", {}, known)
    assert [step for step, _ in run.logged] == [8, 9, 10]
    wandb.send("epoch", {"global_step": 5, "val/AP": 0.05})
    assert len(run.logged) == 3
    wandb.send("epoch", {"global_step": 10, "val/AP": 0.1})
    assert run.logged[3] == (10, {"global_step": 10, "val/AP": 0.1})


def test_an_epoch_record_that_comes_late_goes_into_the_next_open_row(tmp_path, monkeypatch):
    run = FakeRun()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr("ray_det.report.wandb_run._init", lambda mode, **start: run)
    wandb = WandbRun(tmp_path, WandbConfig.model_validate(dict(mode="online")), "name", "id0", {}, [])
    wandb.send("epoch", {"global_step": 7, "val/AP": 0.05})
    wandb.send("step", {"global_step": 8, "train/batch_loss": 0.5})
    assert run.logged == [(8, {"global_step": 7, "val/AP": 0.05}), (8, {"train/batch_loss": 0.5})]


def test_numbers_that_are_not_finite(tmp_path):
    tracker = start(tmp_path)
    tracker.log_step(np.int64(1), {"train/batch_loss": float("nan"), "train/grad_norm": np.float32("inf")})  # pyright: ignore
    tracker.log_step(2, {"train/batch_loss": np.float32(0.5)})
    tracker.finish()
    text = (tmp_path / "metrics.jsonl").read_text()
    first, second = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert first == {"global_step": 1, "train/batch_loss": None, "train/grad_norm": None}
    assert second == {"global_step": 2, "train/batch_loss": 0.5}
    assert steps(rows(tmp_path)) == [1, 2]
    assert math.isnan(rows(tmp_path)[0]["train/batch_loss"])


@pytest.mark.parametrize("then", ["flush", "log_step", "log_epoch", "log_test", "log_pictures", "finish"])
def test_a_steps_record_waits_for_whatever_comes_next(tmp_path, then):
    tracker = start(tmp_path, "disabled")
    path = tmp_path / "metrics.jsonl"
    tracker.log_step(1, {"train/batch_loss": 0.5})
    assert path.read_text() == ""
    boxes, labels, scores = np.empty((0, 4)), np.empty(0, int), np.empty(0)
    picture = Picture(7, np.zeros((8, 8, 3), np.uint8), boxes, labels, boxes, scores, labels)
    given = {"flush": (), "finish": (), "log_pictures": (1, [picture], [])}.get(then, (2, {"train/batch_loss": 0.25}))
    getattr(tracker, then)(*given)
    assert json.loads(path.read_text().splitlines()[0]) == {"global_step": 1, "train/batch_loss": 0.5}
    tracker.finish()
    assert len(path.read_text().splitlines()) == 1 + (len(given) == 2), "each once"


def test_whoever_watches_is_told_of_a_step_at_once_and_once(tmp_path):
    told = []
    tracker = Tracker(tmp_path, WandbConfig(mode="disabled"), "name", "id0", {}, publish=told.append)
    tracker.log_step(1, {"train/batch_loss": 0.5})
    assert told == [{"global_step": 1, "train/batch_loss": 0.5}]
    tracker.log_epoch(1, {"val/AP": 0.25})
    tracker.finish()
    assert told[1:] == [{"global_step": 1, "val/AP": 0.25}]


def test_a_step_without_its_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train/batch_loss"):
        start(tmp_path, "disabled").log_step(1, {"loss": 1.0})


@pytest.mark.parametrize("torn", ['{"global_step": 3, "tra', '{"global_step": 3}', ""])
@pytest.mark.parametrize("keep, left", [(None, 0), (0, 0), (2, 2), (9, 3)])
def test_metrics_are_cut_to_the_checkpoints_lines(tmp_path, keep, left, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"global_step": {k}}}\n' for k in range(3)) + torn)
    tracker = start(tmp_path, "disabled", keep_lines=keep)
    assert tracker.lines == left
    tracker.log_step(7, {"train/batch_loss": 1.0})
    tracker.flush()
    assert [json.loads(line)["global_step"] for line in path.read_text().splitlines()] == [*range(left), 7]
    tracker.finish()


def test_each_line_is_there_at_once(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.append(1, {"a": 1})
    assert list(read_records(file.path)) == [{"global_step": 1, "a": 1}]
    file.close()


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_without_a_key_it_logs_offline_and_asks_nothing(tmp_path, mode, monkeypatch, caplog):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("prompted"))
    monkeypatch.setattr("getpass.getpass", lambda *a: pytest.fail("prompted"))
    tracker = start(tmp_path, mode)
    train(tracker, 1, 2)
    tracker.finish()
    assert steps(rows(tmp_path)) == [1, 2]
    assert tracker.url is None
    assert len(warnings(caplog)) == (mode == "online")


def test_disabled_does_not_import_wandb(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from ray_det.report.tracker import Tracker\nfrom ray_det.config import WandbConfig\n"
        f"t = Tracker(pathlib.Path({str(tmp_path)!r}), WandbConfig(mode='disabled'), 'n', 'i', {{}})\n"
        "t.log_step(1, {'train/batch_loss': 1.0}); t.finish()\n"
        "assert not {'wandb', 'ray', 'torch'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not (tmp_path / "wandb").exists()


def test_a_server_that_cannot_be_reached_means_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ray_det.report.wandb_run.INIT_TIMEOUT_S", 2.0)
    tracker = start(tmp_path, "online")
    train(tracker, 1, 2)
    tracker.finish()
    assert "going online" in caplog.text
    assert len(warnings(caplog)) == 1
    assert 1 in steps(rows(tmp_path)) and steps(rows(tmp_path)).count(2) == 1


def test_wandb_that_breaks_down_stops_nothing(tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no disk\nsecond line")

    monkeypatch.setattr("ray_det.report.wandb_run._init", broken)
    tracker = start(tmp_path)
    train(tracker, 1, 5)
    tracker.finish()
    assert tracker.lines == 6
    assert warnings(caplog) == ["wandb: starting failed: RuntimeError: no disk"]


def test_wandb_failing_in_the_middle_is_one_warning(tmp_path, monkeypatch, caplog):
    run = FakeRun()
    monkeypatch.setattr("ray_det.report.wandb_run._init", lambda mode, **start: run)
    tracker = start(tmp_path)
    monkeypatch.setattr(run, "log", lambda *a, **k: (_ for _ in ()).throw(OSError("gone")))
    train(tracker, 20, 25)
    tracker.finish()
    assert (tracker.lines, len(warnings(caplog))) == (8, 1)


def test_pictures_are_files_and_wandb_images_with_boxes(tmp_path):
    box = np.array([[1.0, 2, 20, 30]])
    picture = Picture(7, np.full((40, 60, 3), 90, np.uint8), box, np.array([1]), box, np.array([0.9]), np.array([0]))
    tracker = start(tmp_path)
    for k in (1, 2):
        tracker.log_step(k, {"train/batch_loss": 1.0})
        tracker.log_pictures(k, [picture], ["cat", "dog"])
        tracker.log_epoch(k, {"val/AP": 0.1})
    tracker.finish()
    files = [p.name for p in (tmp_path / "pictures").iterdir()]
    assert files == ["step_00000002_00_image_7.jpg"]
    first, second = rows(tmp_path)
    assert (first["_step"], second["_step"]) == (1, 2)
    assert first["val/pictures/count"] == 1
    assert first["global_step"] == 1
    boxes = next(tmp_path.glob("wandb/offline-run-*/files/media/metadata/boxes2D/val/*.json"))
    (drawn,) = json.loads(boxes.read_text())["box_data"]
    assert drawn["box_caption"] in ("cat 0.90", "dog")
    assert drawn["position"] == pytest.approx(dict(minX=1 / 60, minY=2 / 40, maxX=20 / 60, maxY=30 / 40))
