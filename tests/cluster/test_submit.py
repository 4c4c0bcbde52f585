"""`cluster/scripts/submit.sh` and `ray job submit` against a head and workers with token authentication."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.running import SUBMIT, Running, cluster
from tests.ranks import ROOT
from tests.train.disturb import EPOCHS, STEPS, config, newest, require_same, steps_done, write
from tests.train.runner import run_alone

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DRAIN = ROOT / "cluster" / "scripts" / "drain.sh"


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    with cluster(tmp_path_factory.mktemp("cluster"), workers=2, cpus=2) as started:
        yield started


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    """That all nodes reach; `run` is the run of the first test."""
    return tmp_path_factory.mktemp("storage")


def follow(running: Running, *arguments: object) -> subprocess.Popen[str]:
    """`submit.sh`, which shows the log until the job ends."""
    command = [SUBMIT, *map(str, arguments)]
    return subprocess.Popen(
        command, env=running.client, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def processes_of_a_run(running: Running) -> list[str]:
    """Command lines of what a job starts and must not leave on any node."""
    nodes = [psutil.Process(pid) for pid in running.pids]
    lines = [" ".join(child.cmdline()) for node in nodes for child in node.children(recursive=True)]
    return [line for line in lines if "RayTrainWorker" in line or "jobs/train.py" in line]


def require_readable(running: Running, job: str) -> str:
    """A job's log: one line after the other, as a file of lines is read."""
    log = (running.sessions[0] / "logs" / f"job-driver-{job}.log").read_text()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", log), repr(log)
    assert "Traceback" not in log and "arning" not in log, log
    return log


def test_a_submitted_run_is_stopped_and_goes_on(running, storage, small_coco, tmp_path):
    asked, alone = config(small_coco, storage), config(small_coco, tmp_path / "alone")
    for one in (asked, alone):
        one["train"]["epochs"] = 5 * EPOCHS  # the command to stop it takes its time
        one["eval"]["every_epochs"] = EPOCHS
    undisturbed, run = run_alone({"config": alone, "world": 1}), storage / "run"
    command = ["train", "--config", write(asked, tmp_path / "asked"), "--name", "run"]
    first = follow(running, *command)
    while steps_done(run) < STEPS + 3:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    assert "train-run-1 runs already" in running.submit("--no-wait", *command)
    running.submit("stop", "train-run-1")
    log, _ = first.communicate(timeout=120)
    stopped_at = steps_done(run)
    assert "with a checkpoint" in log and stopped_at < 5 * EPOCHS * STEPS, log
    assert json.loads((newest(run) / "state.json").read_text())["state"]["global_step"] == stopped_at
    assert processes_of_a_run(running) == []

    log = running.submit(*command)
    assert f"goes on from step {stopped_at}" in log and "'train-run-2' succeeded" in log, log
    assert "\x1b" not in log
    log = require_readable(running, "train-run-2")
    assert re.search(r"\[#+\.*\] \d+/\d+ .*img/s", log), log
    assert re.search(r"^val  ( +\d\.\d{3}| +-){7}$", log, re.MULTILINE), log
    assert f"run folder: {run}" in log
    require_same(run, undisturbed)


def test_evaluation_and_prediction_are_submitted(running, storage, small_coco, tmp_path):
    done = ["--checkpoint", storage / "run"]
    options = ["--id", "evaluation", "eval", *done, "--data.val", small_coco["test"]]
    log = running.submit(*options, "--output", storage / "evaluated")
    assert "succeeded" in log and (storage / "evaluated" / "summary.json").exists(), log
    require_readable(running, "evaluation-1")
    typed = ["--submission-id", "typed", "--working-dir", ".", "--", "python", "jobs/predict.py", *map(str, done)]
    typed += ["--input", str(small_coco["test"].parent), "--output", str(storage / "predicted")]
    log = running.ray("job", "submit", *typed)
    assert "succeeded" in log and json.loads((storage / "predicted" / "detections.json").read_text()), log
    require_readable(running, "typed")


def test_a_sweep_is_submitted(running, storage, small_coco, tmp_path):
    asked = config(small_coco, storage)
    asked["name"], asked["tune"] = "sweep", {"trials": 2}
    asked["train"]["epochs"] = 1
    asked["eval"]["every_epochs"] = 1
    log = running.submit("--id", "sweep", "tune", "--config", write(asked, tmp_path / "sweep"))
    assert "succeeded" in log and (storage / "sweep" / "best.yaml").exists(), log
    require_readable(running, "sweep-1")


def test_a_node_is_drained(running, storage, small_coco, tmp_path):
    """`drain.sh`, as the preStop hook calls it: the run keeps a checkpoint and goes on elsewhere."""
    asked = config(small_coco, storage)
    asked["name"] = "drained"
    asked["train"]["epochs"] = 3 * EPOCHS
    asked["workers"]["max_failures"] = 0
    job = follow(running, "train", "--config", write(asked, tmp_path / "drained"), "--name", "drained")
    while steps_done(storage / "drained") < 3:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    said = running.run(str(DRAIN), "1")
    nodes = [node["node_id"] for node in json.loads(running.ray("list", "nodes", "--format", "json"))]
    assert "found not one Ray node here" in said and all(node in said for node in nodes), said  # all are here
    actors = json.loads(running.ray("list", "actors", "--detail", "--format", "json"))
    at = {a["node_id"] for a in actors if a["class_name"].startswith("RayTrainWorker") and a["state"] == "ALIVE"}
    said = running.run(str(DRAIN), "20", at.pop(), RAY_ADDRESS=running.gcs)
    log, _ = job.communicate(timeout=240)
    assert "a node is about to be taken away: left after step" in log and "succeeded" in log, said + log
    assert len(re.findall(r"^goes on from step", log, re.MULTILINE)) == 1, log


def test_the_code_that_was_sent_runs_everywhere(running):
    where = "import ray, ray_det; ray.init(log_to_driver=False, logging_level='ERROR'); print(ray_det.__file__); "
    where += "print(ray.get(ray.remote(lambda: __import__('ray_det').__file__).remote()))"
    log = running.ray("job", "submit", "--working-dir", ".", "--", "python", "-c", where)
    assert len(re.findall(r"working_dir_files/\S+/ray_det/__init__\.py", log)) == 2, log


def test_nothing_is_sent_without_the_token(running, tmp_path):
    stranger = Running(running.client | {"RAY_AUTH_TOKEN": "0" * 32}, "", [], [], [])
    said = stranger.submit("train", "--name", "intruder")
    assert "401" in said or "nvalid authentication token" in said, said
    assert "intruder" not in running.ray("job", "list")
    driver = stranger.run(sys.executable, "jobs/train.py", "--storage", str(tmp_path), RAY_ADDRESS=running.gcs)
    last = driver.splitlines()[-1]
    assert last.startswith(f"error: RAY_ADDRESS {running.gcs}: ") and "InvalidAuthToken" in last, driver
    assert "Traceback" not in driver
