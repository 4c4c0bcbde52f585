"""Half an hour in which something happens every minute: `pytest -m slow tests/train/test_soak.py -s`.

RAY_DET_SOAK_MINUTES makes it shorter or longer.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_det.data import embedded
from ray_det.storage import Folder
from tests.s3 import S3Server, s3_server
from tests.train.disturb import config, require_same, write
from tests.train.nodes import WORKER_CPUS, Nodes, nodes
from tests.train.runner import run_world

MINUTES = float(os.environ.get("RAY_DET_SOAK_MINUTES", "30"))
PAUSE_S = 60.0
STEPS_PER_MINUTE = 135  # undisturbed it does several times that
EPOCH_STEPS = 110
STEP_LINE = r"step \d+/\d+"
FAULTS = ("worker", "node", "notice", "storage")


def job(folder: Path) -> dict[str, Any]:
    paths = embedded.generate(folder / "coco", seed=2, train=2 * EPOCH_STEPS, val=8, test=8)
    asked = config(paths, folder / "alone")
    asked["train"] |= {"epochs": round(MINUTES * STEPS_PER_MINUTE / EPOCH_STEPS), "checkpoint_every_steps": 25}
    asked["train"]["micro_batch_size"] = 1
    asked["eval"]["every_epochs"] = 5
    asked["workers"] |= {"num": 2, "max_failures": 1000, "max_preemption_failures": 1000, "start_timeout_s": 120}
    return asked


class Watcher:
    """Reads what the driver prints, and how much memory every process has."""

    def __init__(self, driver: subprocess.Popen[str]) -> None:
        self.driver, self.lines, self.began = driver, list[str](), time.monotonic()
        self.restarts: list[tuple[float, int]] = []  # when, and from which step
        self.memory: dict[tuple[int, str], list[int]] = defaultdict(list)
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._read, self._weigh)]
        for thread in self._threads:
            thread.start()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    @property
    def steps(self) -> int:
        """Of the last line of progress that was printed."""
        for line in reversed(self.lines):
            if found := re.search(r"\] (\d+)/\d+", line):
                return int(found[1])
        return 0

    def wait_for(self, pattern: str, seen: int) -> None:
        """Until the driver has printed such a line, after `seen` lines, or ended."""
        while self.driver.poll() is None and not any(re.search(pattern, line) for line in self.lines[seen:]):
            time.sleep(0.1)

    def _read(self) -> None:
        assert self.driver.stdout
        for line in self.driver.stdout:
            self.lines.append(line.rstrip())
            if found := re.match(r"goes on from step (\d+)", line):
                self.restarts.append((time.monotonic(), int(found[1])))
            if re.match(r"goes on|worker failure|a node|slow|stalled|epoch", line):
                self.say("  " + line.rstrip()[:160])

    def _weigh(self) -> None:
        while self.driver.poll() is None:
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    self.memory[process.pid, process.name()].append(process.memory_info().rss >> 20)
                except psutil.Error:
                    pass
            time.sleep(10)


def disturb(kind: str, cluster: Nodes, s3: S3Server, chance: random.Random) -> None:
    if kind == "worker":
        a_train_worker(chance).kill()
    elif kind == "storage":
        s3.freeze()
        time.sleep(chance.uniform(5, 20))
        s3.thaw()
    else:
        node = cluster.node_of(a_train_worker(chance).pid)
        cluster.add()
        if kind == "notice":
            cluster.drain(node, deadline_s=30)
            time.sleep(30)
        cluster.remove(node)


def inflict(kind: str, watcher: Watcher, cluster: Nodes, s3: S3Server, chance: random.Random) -> None:
    """A fault, and the time until the run goes on."""
    watcher.say(f"{kind}, after step {watcher.steps}")
    began, seen, restarts = time.monotonic(), len(watcher.lines), len(watcher.restarts)
    disturb(kind, cluster, s3, chance)
    if kind != "storage":
        watcher.wait_for("^goes on from|steps per epoch", seen)
    watcher.wait_for(STEP_LINE, len(watcher.lines))
    for at, step in watcher.restarts[restarts:]:
        watcher.say(f"  {kind}: back after {at - began:.0f} s, from step {step}")


def a_train_worker(chance: random.Random) -> psutil.Process:
    while True:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith("ray::RayTrainWorker"):
                    found.append(process)
            except psutil.Error:
                pass
        if found and (one := chance.choice(found)).is_running():
            return one


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_half_an_hour_of_faults_changes_nothing(tmp_path):
    asked = job(tmp_path)
    pool = ThreadPoolExecutor()
    undisturbed = pool.submit(run_world, {"config": asked, "world": 2}, tmp_path, timeout_s=3600)
    asked = asked | {"storage": "s3://bucket/runs", "workers": asked["workers"] | {"cpus": WORKER_CPUS}}
    chance, happened = random.Random(0), []
    with s3_server(tmp_path / "s3") as s3, nodes(workers=3) as cluster:
        watcher = Watcher(cluster.start(write(asked, tmp_path / "config")))
        watcher.wait_for(r"^epoch 1/\d+: loss", 0)  # by then one checkpoint is kept: that of step 100
        while watcher.driver.poll() is None:
            time.sleep(max(0.0, PAUSE_S * (len(happened) + 1) - (time.monotonic() - watcher.began)))
            if watcher.driver.poll() is None:
                kind = FAULTS[len(happened) % len(FAULTS)] if len(happened) < len(FAULTS) else chance.choice(FAULTS)
                inflict(kind, watcher, cluster, s3, chance)
                happened.append(kind)
        assert watcher.driver.returncode == 0, "\n".join(watcher.lines[-30:])
        Folder.at("s3://bucket/runs").download(tmp_path / "run", "run")
    watcher.say(f"ended after {len(happened)} faults: { ({kind: happened.count(kind) for kind in FAULTS}) }")
    assert set(happened) == set(FAULTS)
    require_same(tmp_path / "run", undisturbed.result())
    require_flat(watcher)


def require_flat(watcher: Watcher) -> None:
    """Processes that lived through most of it have as much memory at the end as near the beginning."""
    longest = max(map(len, watcher.memory.values()))
    for (pid, name), weights in watcher.memory.items():
        if len(weights) < 0.7 * longest or name == "weed":  # the S3 server keeps what it holds in memory
            continue
        fifth = len(weights) // 5
        early, late = (statistics.median(part) for part in (weights[fifth : 2 * fifth], weights[-fifth:]))
        watcher.say(f"memory of {name} ({pid}): {early:.0f} -> {late:.0f} MiB")
        assert late < 1.25 * early + 30, (name, weights)
