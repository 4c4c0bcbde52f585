"""Several Ray nodes on this machine, of which some are lost while a run is on them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.jobs.run import JOBS
from tests.ranks import ROOT
from tests.train.disturb import STEPS, config, require_same, steps_done, write
from tests.train.nodes import WORKER_CPUS, Nodes, nodes
from tests.train.runner import records, run_alone, run_world

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def two_workers(small_coco: dict[str, Path], storage: Path, **workers: Any) -> dict[str, Any]:
    asked = config(small_coco, storage)
    asked["train"]["micro_batch_size"] = 1
    asked["workers"] |= {"num": 2, "cpus": WORKER_CPUS} | workers
    return asked


@pytest.fixture(scope="module")
def undisturbed(small_coco, tmp_path_factory) -> Path:
    """Two workers in plain processes, to whom nothing happens."""
    storage = tmp_path_factory.mktemp("undisturbed")
    return run_world({"config": two_workers(small_coco, storage, cpus=1), "world": 2}, storage)


def wait_for_step(run: Path, step: int, driver: subprocess.Popen[str]) -> None:
    while steps_done(run) < step:
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.02)


def node_of_a_worker(cluster: Nodes) -> Any:
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or ()).startswith("ray::RayTrainWorker"):
            return cluster.node_of(process.pid)
    raise LookupError("no train worker")


def ended(driver: subprocess.Popen[str]) -> str:
    output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, output
    return output


def test_a_node_taken_away_with_notice_and_one_without_change_nothing(small_coco, undisturbed, tmp_path):
    """The notice costs no failure and no step; the loss one failure and the steps since the last checkpoint."""
    asked = two_workers(small_coco, tmp_path / "runs", max_failures=1)
    run = tmp_path / "runs" / "run"
    with nodes(workers=4) as cluster:
        driver = cluster.start(write(asked))
        wait_for_step(run, STEPS + 3, driver)
        cluster.drain(node_of_a_worker(cluster), deadline_s=120)
        wait_for_step(run, 3 * STEPS + 3, driver)
        cluster.remove(node_of_a_worker(cluster))
        output = ended(driver)
    notice = output.split("a node is about to be taken away: left after step ")[1].split(",")[0]
    assert f"goes on from step {notice}, with" in output
    assert "worker failure: rank" in output and output.count("goes on from step") == 2
    require_same(run, undisturbed)


def test_workers_leave_and_come_and_the_curve_stays(small_coco, tmp_path):
    """2 -> 1 -> 2 workers: the same micro-batches in the same steps, and the losses to rounding."""
    asked = two_workers(small_coco, tmp_path / "runs", num="1..2", resize_interval_s=3)
    asked["train"]["epochs"] = epochs = 20
    asked["eval"]["every_epochs"] = epochs
    run = tmp_path / "runs" / "run"
    with nodes(workers=2) as cluster:
        driver = cluster.start(write(asked))
        wait_for_step(run, STEPS + 3, driver)
        cluster.remove(node_of_a_worker(cluster))
        wait_for_step(run, 3 * STEPS, driver)
        cluster.add()
        output = ended(driver)
    starts = re.findall(r"goes on from step \d+, .*, on (\d)", output)
    assert starts == ["1", "2"], output
    alone = asked | {"storage": str(tmp_path / "alone"), "workers": {"num": 1, "threads": 1}}
    expected, got = records(run_alone({"config": alone, "world": 1})), records(run)
    assert [r["global_step"] for r in got] == [r["global_step"] for r in expected]
    for one, other in zip(got, expected, strict=True):
        if "train/batch_loss" in one:
            assert one["train/batch_loss"] == pytest.approx(other["train/batch_loss"], rel=1e-3)


def test_a_killed_driver_goes_on_with_another_number_of_workers(small_coco, undisturbed, tmp_path):
    asked = two_workers(small_coco, tmp_path / "runs", num=1, cpus=1)
    file, run = write(asked), tmp_path / "runs" / "run"
    command = [sys.executable, "-W", "ignore", str(JOBS / "train.py"), "--config", str(file)]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(run, STEPS + 3, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    again = subprocess.run([*command, "--workers.num", "2"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert re.search(r"goes on from step \d+, .*, on 2 workers", again.stdout)
    for one, other in zip(records(run), records(undisturbed), strict=True):
        assert one["global_step"] == other["global_step"]
        if "train/batch_loss" in one:
            assert one["train/batch_loss"] == pytest.approx(other["train/batch_loss"], rel=1e-3)
