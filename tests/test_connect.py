"""Ray as a run on one machine starts and ends it."""

from __future__ import annotations

import shutil
import subprocess
import sys

import psutil
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


STUCK = """
import atexit, os, time
import ray
from ray_det.cluster import start_ray
from ray_det.config import WorkersConfig

class Stuck:
    def pid(self):
        atexit.register(time.sleep, 600)
        return os.getpid()

start_ray(WorkersConfig())
stuck = ray.remote(Stuck).remote()
print(ray.get(stuck.pid.remote()))
del stuck
time.sleep(2)
"""


@pytest.mark.ray
def test_no_process_outlives_a_local_run(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, check=True, timeout=120)
    process = int(done.stdout)
    assert not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


SHARED = """
import os
import ray
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray_det.cluster import start_ray
from ray_det.config import WorkersConfig
from ray_det.connect import train_environment

start_ray(WorkersConfig())
assert train_environment() == get_env_vars_to_propagate(), get_env_vars_to_propagate()
environment = {"env_vars": train_environment()}

@ray.remote
def load():
    return os.getpid()

class Worker:
    def load(self):
        return ray.get(load.remote())

class Controller:
    def load(self):
        return ray.get(ray.remote(Worker).options(runtime_env=environment).remote().load.remote())

ours = ray.get(load.options(runtime_env=environment).remote())
theirs = ray.get(ray.remote(Controller).options(runtime_env=environment).remote().load.remote())
print(ours == theirs)
"""


@pytest.mark.ray
def test_train_workers_get_the_loaders_that_the_driver_started(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "True\n"


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
