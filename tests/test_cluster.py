"""Ray as a run on one machine starts it."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOCAL = """
import psutil
from ray_det.cluster import start_ray
from ray_det.config import WorkersConfig

start_ray(WorkersConfig())
for process in psutil.Process().children(recursive=True):
    print(" ".join(process.cmdline()))
"""


@pytest.mark.ray
def test_a_local_start_has_no_processes_that_nobody_uses(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run([sys.executable, "-c", LOCAL], capture_output=True, text=True, check=True, timeout=120)
    assert "raylet" in done.stdout and "gcs_server" in done.stdout
    unused = ("dashboard/dashboard.py", "monitor.py")  # the log monitor's name ends so too
    assert [line for line in done.stdout.splitlines() if any(name in line for name in unused)] == []
