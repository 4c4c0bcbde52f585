"""`ray job submit` and `ray job stop` against a head that `ray start` has started."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.jobs.run import JOBS
from tests.ranks import ROOT
from tests.s3 import free_ports
from tests.train.disturb import EPOCHS, STEPS, config, newest, require_same, steps_done, write
from tests.train.runner import run_alone

RAY = str(Path(sys.executable).with_name("ray"))
STOP = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}}


@pytest.fixture
def head(tmp_path) -> Iterator[dict[str, str]]:
    """The environment in which `ray job` finds the head."""
    port, dashboard, agent, grpc = map(str, free_ports(4))
    environment = os.environ | {
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    options = ["--port", port, "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent]
    options += ["--dashboard-agent-grpc-port", grpc, "--num-cpus", "4", "--disable-usage-stats", "--block"]
    options += ["--temp-dir", mkdtemp(prefix="ray")]  # a short path; the usual one would show this head to others
    own = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen([RAY, "start", "--head", *options], env=own, stdout=log, stderr=log)
    try:
        while subprocess.run([RAY, "job", "list"], env=environment, capture_output=True).returncode:
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            time.sleep(1)
        yield environment
    finally:
        process.terminate()
        process.wait(timeout=60)


def job(head: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([RAY, "job", *arguments], env=head, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def wait_for(head: dict[str, str], name: str, state: str) -> None:
    while not (said := job(head, "status", name)).count(state):
        ended = [other for other in ("FAILED", "STOPPED", "SUCCEEDED", "succeeded", "failed") if other in said]
        assert not ended, said + job(head, "logs", name)
        time.sleep(1)


@pytest.mark.ray
@pytest.mark.slow
def test_a_stopped_job_keeps_a_checkpoint_and_goes_on(head, small_coco, tmp_path):
    asked, alone = (config(small_coco, tmp_path / name) for name in ("runs", "alone"))
    for one in (asked, alone):
        one["train"]["epochs"] = 5 * EPOCHS  # the command to stop it takes its time
    undisturbed, run = run_alone({"config": alone, "world": 1}), tmp_path / "runs" / "run"
    submit = ["submit", "--no-wait", "--runtime-env-json", json.dumps(STOP), "--submission-id"]
    entry = ["--", sys.executable, "-W", "ignore", str(JOBS / "train.py"), "--config", str(write(asked))]
    assert "submitted successfully" in (said := job(head, *submit, "first", *entry)), said
    deadline = time.monotonic() + 120
    while steps_done(run) < STEPS + 3:
        assert time.monotonic() < deadline, job(head, "logs", "first")
        time.sleep(0.05)
    job(head, "stop", "first")
    wait_for(head, "first", "stopped")
    assert "with a checkpoint" in (said := job(head, "logs", "first")), said
    stopped_at = steps_done(run)
    assert stopped_at < 5 * EPOCHS * STEPS
    assert json.loads((newest(run) / "state.json").read_text())["state"]["global_step"] == stopped_at
    assert "submitted successfully" in (said := job(head, *submit, "second", *entry)), said
    wait_for(head, "second", "succeeded")
    require_same(run, undisturbed)
