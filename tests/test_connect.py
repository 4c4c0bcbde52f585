"""Ray as a run on one machine starts and ends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import psutil
import pytest

LOCAL = """
import atexit, json, os, time
import psutil
import ray
from ray_det.cluster import start_ray
from ray_det.config import WorkersConfig

class Stuck:
    def me(self):
        atexit.register(time.sleep, 600)
        return os.getpid(), os.nice(0), os.environ.get("MALLOC_ARENA_MAX")

def late():
    "What a thread does that is left over."
    try:
        ray.put(1)
    except Exception:
        pass
    print(json.dumps(ray.is_initialized()))

atexit.register(late)  # after the end
start_ray(WorkersConfig())
stuck = ray.remote(Stuck).remote()
pid, niceness, arenas = ray.get(stuck.me.remote())
processes = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
print(json.dumps({"processes": processes, "pid": pid, "niceness": niceness - os.nice(0), "arenas": arenas}))
del stuck
time.sleep(2)
"""


@pytest.fixture(scope="module")
def local() -> dict[str, Any]:
    """What a process saw that started Ray here, and ended with an actor that cannot end."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", LOCAL]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    seen, again = map(json.loads, done.stdout.splitlines())
    return seen | {"again": again}


@pytest.mark.ray
def test_a_local_start_has_no_processes_that_nobody_uses(local):
    processes = "\n".join(local["processes"])
    assert "raylet" in processes and "gcs_server" in processes
    unused = ("dashboard/dashboard.py", "monitor.py")  # the log monitor's name ends so too
    assert [line for line in local["processes"] if any(name in line for name in unused)] == []


@pytest.mark.ray
def test_processes_that_work_are_not_stalled_by_those_that_start(local):
    """Ray would lower a process's priority once it has work, and one that starts has the driver's."""
    assert local["niceness"] == 0


@pytest.mark.ray
def test_threads_share_the_memory_that_a_process_keeps(local):
    assert local["arenas"] == "1"


@pytest.mark.ray
def test_nothing_starts_ray_again_after_the_end(local):
    assert local["again"] is False


@pytest.mark.ray
def test_no_process_outlives_a_local_run(local):
    process = local["pid"]
    assert not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


WORKER = """
import os
import ray
from ray_det.cluster import start_ray
from ray_det.config import WorkersConfig

start_ray(WorkersConfig())
print(*ray.get(ray.remote(lambda: (os.getcwd(), os.environ.get("UV_RUN_RECURSION_DEPTH"))).remote()))
"""


@pytest.mark.ray
@pytest.mark.skipif(not shutil.which("uv"), reason="needs uv")
def test_under_uv_run_workers_use_this_environment_as_it_is(monkeypatch, tmp_path):
    """Ray would copy the working directory, and have uv make an environment for each of them."""
    for name in ("RAY_ADDRESS", "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "UV_RUN_RECURSION_DEPTH"):
        monkeypatch.delenv(name, raising=False)
    command = ["uv", "run", "--no-project", "--python", sys.executable, "python", "-c", WORKER]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path)
    assert done.stdout == f"{tmp_path} 1\n"
