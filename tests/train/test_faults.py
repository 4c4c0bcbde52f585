"""Real kills in the middle of a run, which must end as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.jobs.run import JOBS, run_job
from tests.ranks import ROOT
from tests.train.disturb import EPOCHS, STEPS, config, newest, require_same, steps_done, when_at, write
from tests.train.runner import by_step, run_alone

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def undisturbed(small_coco, tmp_path_factory) -> Path:
    return run_alone({"config": config(small_coco, tmp_path_factory.mktemp("undisturbed")), "world": 1})


def ray_processes(parent: int, name: str) -> list[psutil.Process]:
    """Living descendants of a process that Ray calls `ray::<name>…`."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(f"ray::{name}"):
                found.append(process)
        except psutil.Error:  # it ended meanwhile
            pass
    return found


def kill(name: str) -> str:
    """SIGKILL to the first such process that is seen; -> its name."""
    while not (found := ray_processes(os.getpid(), name)):
        time.sleep(0.001)
    found[0].kill()
    return name


def children(driver: subprocess.Popen[str]) -> dict[psutil.Process, str]:
    """What Ray runs for a driver, with names, but a node's two agents: they look for their raylet seldom, and end a
    minute later.
    """
    names = {process: process.name() for process in psutil.Process(driver.pid).children(recursive=True)}
    return {process: name for process, name in names.items() if not name.endswith("Agent")}


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_loader_a_killed_worker_and_a_killed_validation_change_nothing(
    small_coco, undisturbed, tmp_path, capfd
):
    """One after the other in a run that validates in the background."""
    asked = config(small_coco, tmp_path / "runs")
    asked["eval"]["background"] = True
    file, run = write(asked), tmp_path / "runs" / "run"
    steps = {"ReadRange": STEPS - 3, "RayTrainWorker": STEPS + 3, "Validator": 2 * STEPS + 1}
    with ExitStack() as stack:
        killed = [stack.enter_context(when_at(run, step, partial(kill, name))) for name, step in steps.items()]
        assert run_job("train", "--config", file) == 0
    assert killed == [[name] for name in steps]
    require_same(run, undisturbed, by_step)
    assert "goes on from step" in capfd.readouterr().out


def command(file: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", str(JOBS / "train.py"), "--config", str(file)]


def start_and_signal(file: Path, run: Path, step: int, number: int) -> tuple[int, str]:
    """Start the job as a terminal does and signal its process group at a step; -> exit status and output.

    Nothing that it started may be left.
    """
    driver = subprocess.Popen(
        command(file), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    with when_at(run, step, lambda: children(driver)) as seen:
        while driver.poll() is None and not seen:
            time.sleep(0.01)
        os.killpg(driver.pid, number)
        output, _ = driver.communicate(timeout=120)
    titles, processes = seen[0].values(), list(seen[0])
    assert len(titles) > 5 and not any("TrainController" in title for title in titles)  # that is the driver
    assert not psutil.wait_procs(processes, timeout=30)[1]
    return driver.returncode, output


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_of_the_step(small_coco, undisturbed, tmp_path):
    file = write(config(small_coco, tmp_path / "runs"))
    run = tmp_path / "runs" / "run"
    status, output = start_and_signal(file, run, STEPS + 1, signal.SIGINT)
    assert status == 128 + signal.SIGINT, output
    assert "with a checkpoint" in output and "Traceback" not in output
    stopped_at = steps_done(run)
    assert stopped_at < EPOCHS * STEPS
    assert json.loads((newest(run) / "state.json").read_text())["state"]["global_step"] == stopped_at
    assert "goes on from step" in go_on(file)
    require_same(run, undisturbed)


def test_a_killed_and_a_corrupted_run_go_on_by_the_same_command(small_coco, undisturbed, tmp_path):
    """After SIGKILL the newest checkpoint is damaged: the one before is used."""
    file = write(config(small_coco, tmp_path / "runs"))
    run = tmp_path / "runs" / "run"
    status, output = start_and_signal(file, run, STEPS + 3, signal.SIGKILL)
    assert status == -signal.SIGKILL, output
    assert steps_done(run) < EPOCHS * STEPS
    weights = newest(run) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1  # still a safetensors file
    weights.write_bytes(content)
    output = go_on(file)
    assert "SHA-256 differs): using the one before" in output and "goes on from step" in output
    require_same(run, undisturbed)


def go_on(file: Path) -> str:
    """The same command once more; -> what it prints."""
    again = subprocess.run(command(file), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    return again.stdout
