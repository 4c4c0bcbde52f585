"""Data and run folder on a real S3 server, which goes away in the middle of a run."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ray_det.storage import Folder
from tests.jobs.run import JOBS
from tests.ranks import ROOT
from tests.train.disturb import STEPS, config, require_same, write
from tests.train.runner import run_alone

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def remote(small_coco: dict[str, Path], name: str, **workers: Any) -> dict[str, Any]:
    """The run of `disturb.config`, with its images on S3 too."""
    Folder.at("s3://bucket").upload(small_coco["train"].parent, "data")
    asked = config(small_coco, Path("unused"))
    asked["data"] |= {split: f"s3://bucket/data/{path.name}" for split, path in small_coco.items()}
    return asked | {"storage": "s3://bucket/runs", "name": name, "workers": asked["workers"] | workers}


def start(asked: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    file = write(asked, folder)
    command = [sys.executable, "-W", "ignore", str(JOBS / "train.py"), "--config", str(file)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_line(driver: subprocess.Popen[str], text: str) -> None:
    assert driver.stdout
    for line in driver.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")


def test_an_outage_of_20_s_changes_nothing(s3, small_coco, tmp_path):
    undisturbed = run_alone({"config": config(small_coco, tmp_path / "undisturbed"), "world": 1})
    driver = start(remote(small_coco, "run"), tmp_path / "config")
    wait_for_line(driver, "epoch 1/4: loss")
    s3.stop()
    timer = threading.Timer(20, s3.start)
    timer.start()
    output, errors = driver.communicate(timeout=300)
    timer.join()
    assert driver.returncode == 0, errors
    assert "trying again for up to 120 s" in output or "slow: rank 0 at step" in output
    Folder.at("s3://bucket/runs").download(tmp_path / "run", "run")
    require_same(tmp_path / "run", undisturbed)


def test_an_outage_for_good_ends_the_run_with_one_line(s3, small_coco, tmp_path):
    driver = start(remote(small_coco, "ends", storage_timeout_s=5), tmp_path / "config")
    wait_for_line(driver, "epoch 2/4: loss")  # it was validated: its checkpoint is kept by now
    s3.stop()
    began = time.monotonic()
    _, errors = driver.communicate(timeout=120)
    s3.start()
    assert driver.returncode == 1, errors
    assert errors.splitlines()[-1].startswith("error: cannot ") and "s3://bucket/" in errors.splitlines()[-1]
    assert time.monotonic() - began < 100
    again = start(remote(small_coco, "ends"), tmp_path / "again")
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert f"goes on from step {2 * STEPS}" in output
