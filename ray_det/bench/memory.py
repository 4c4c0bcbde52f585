"""How much memory the processes of a run have, early and late, seen from outside."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import NamedTuple

import psutil

from ray_det.bench.measure import Figure
from ray_det.bench.task import Task, environment
from ray_det.types import UserError

EVERY_S = 1.0
LEAST_EPOCHS = 10
FLAT = "<= 1.1x"
ROLES = {"ray::RayTrainWorker": "train worker"}
"""Of Ray's processes, by how their titles begin."""
LOADING = ("ray::IDLE", "MapBatches")
"""In the titles of workers that load images, or wait for work. What else is a worker of Ray's is one of its actors."""
SYSTEM = ("raylet", "gcs_server")


class Weight(NamedTuple):
    rss: float  # MiB in memory, with what is shared
    own: float  # of that, not shared: what is left out is mostly Ray's object store, mapped by all


Sample = dict[str, Weight]
"""By role, over all processes of that role."""


def weigh(command: list[str], task: Task, epochs: int) -> Iterator[Figure]:
    """Run the job and yield a figure per role: the last fifth of the time against the second.

    Raises:
        UserError: too few epochs.
    """
    if epochs < LEAST_EPOCHS:
        raise UserError(f"--memory_epochs {epochs}: at least {LEAST_EPOCHS}, the first of them warm things up")
    samples = watched(command)
    for role in sorted({role for sample in samples for role in sample}):
        weights = [sample.get(role, Weight(0, 0)) for sample in samples]
        early, late = early_and_late(weights)
        yield Figure(
            f"memory of {role} over {epochs} epochs",
            "MiB",
            "last fifth of the time",
            late.rss,
            [round(weight.rss) for weight in weights[:: max(1, len(weights) // 50)]],
            task.settings(),
            peer="second fifth",
            peer_value=early.rss,
            ratio=late.rss / max(early.rss, 1),
            target=FLAT,
            more={"not shared, early": early.own, "not shared, late": late.own, "samples": len(weights)},
        )


def watched(command: list[str]) -> list[Sample]:
    """Samples of a command's processes, one a second while there is a train worker.

    Raises:
        RuntimeError: it failed.
    """
    samples: list[Sample] = []
    with TemporaryFile("w+") as output:
        job = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
        try:
            while job.poll() is None:
                sample = _sample(psutil.Process(job.pid))
                if "train worker" in sample:
                    samples.append(sample)
                time.sleep(EVERY_S)
        finally:
            job.terminate()  # where this process is ended first
            job.wait()
        if job.returncode:
            output.seek(0)
            raise RuntimeError("".join(output.readlines()[-30:]))
    return samples


def _sample(driver: psutil.Process) -> Sample:
    found: dict[str, list[Weight]] = defaultdict(list)
    try:
        processes = [driver, *driver.children(recursive=True)]
    except psutil.Error:
        return {}
    for process in processes:
        try:
            memory, name = process.memory_info(), "driver" if process == driver else role(process.cmdline())
        except psutil.Error:  # it has ended
            continue
        found[name].append(Weight(memory.rss / 2**20, (memory.rss - memory.shared) / 2**20))
    return {name: Weight(sum(w.rss for w in ws), sum(w.own for w in ws)) for name, ws in found.items()}


def role(command: list[str]) -> str:
    """What a process below the driver does, by its command line."""
    title = " ".join(command)
    for start, name in ROLES.items():
        if title.startswith(start):
            return name
    if title.startswith("ray::"):
        return "loaders" if any(word in title for word in LOADING) else "Ray's actors"
    return next((name for name in SYSTEM if name in (command[0] if command else "")), "Ray's helpers")


def early_and_late(weights: list[Weight]) -> tuple[Weight, Weight]:
    """Medians over the second fifth and over the last."""
    fifth = len(weights) // 5
    early, late = weights[fifth : 2 * fifth], weights[-fifth:]
    return _median(early), _median(late)


def _median(weights: list[Weight]) -> Weight:
    return Weight(statistics.median(w.rss for w in weights), statistics.median(w.own for w in weights))
