"""Nothing waits for ever, and nothing waits silently."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ray_det.train.watch import STALLED
from tests.jobs.run import run_job
from tests.ranks import ROOT
from tests.train.disturb import STEPS, config, require_same, when_at, write
from tests.train.runner import run_alone
from tests.train.test_faults import ray_processes

HANG = """
import time
from ray_det.train import watch
watch.NOTICE_S = 0.5
def tell(text):
    print(text, flush=True)
    {after}
seen = watch.Watch('rank 3', timeout_s=1.5, tell=tell)
with seen.watching():
    seen.at("data", 7)
    for _ in range(10):  # slow, and alive
        time.sleep(0.2)
        seen.at("data")
    time.sleep(60)
"""


@pytest.mark.parametrize("after", ["pass", "raise ConnectionError('nobody listens')"])
def test_a_rank_that_hangs_says_where_and_ends(after):
    """Slow at first, which is no reason to end. That nobody hears it is no reason to hang."""
    began, program = time.monotonic(), HANG.format(after=after)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == STALLED and 3 < time.monotonic() - began < 50
    slow, stalled = done.stdout.splitlines()
    assert slow.startswith("slow: rank 3 at step 7 is in 'data' for ")
    assert stalled.startswith("stalled, and ended: rank 3 at step 7 is in 'data' for ") and ", in <module>" in stalled
    assert "Current thread" in done.stderr or "Thread 0x" in done.stderr


@pytest.fixture(scope="module")
def undisturbed(small_coco, tmp_path_factory) -> Path:
    return run_alone({"config": config(small_coco, tmp_path_factory.mktemp("undisturbed")), "world": 1})


def freeze(name: str) -> str:
    while not (found := ray_processes(os.getpid(), name)):
        time.sleep(0.001)
    found[0].send_signal(signal.SIGSTOP)
    return name


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("who", "report"),
    [("RayTrainWorker", "worker failure: rank 0: "), ("ReadRange", "stalled, and ended: rank 0 at step ")],
)
def test_a_frozen_process_is_replaced(who, report, small_coco, undisturbed, tmp_path, capfd):
    """A rank that is frozen cannot speak; one that waits for a frozen loader can."""
    asked = config(small_coco, tmp_path / "runs")
    asked["workers"]["stall_timeout_s"] = 8
    run = tmp_path / "runs" / "run"
    with when_at(run, STEPS + 1, lambda: freeze(who)) as frozen:
        assert run_job("train", "--config", write(asked)) == 0
    assert frozen == [who]
    require_same(run, undisturbed)
    output = capfd.readouterr().out
    assert report in output and "goes on from step" in output


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ranks_that_wait_for_a_frozen_one_say_so(small_coco, tmp_path, capfd):
    asked = config(small_coco, tmp_path / "runs")
    asked["workers"] |= {"num": 2, "stall_timeout_s": 8}
    run = tmp_path / "runs" / "run"
    with when_at(run, STEPS + 1, lambda: freeze("RayTrainWorker")):
        assert run_job("train", "--config", write(asked)) == 0
    output = capfd.readouterr().out
    assert "stalled, and ended: rank " in output and "all-reduce" in output and "goes on from step" in output
    assert not [p for p in ray_processes(os.getpid(), "RayTrainWorker") if p.status() == psutil.STATUS_STOPPED]
