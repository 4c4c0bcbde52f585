"""Seconds from the command to the first optimizer step, beside a bare script that steps once with the same model, and
how much of it the train worker waits for its first batch."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import Field

from ray_det.bench.measure import Arm, Bench, Figure, compare
from ray_det.types import UserError

BATCH = 4  # images, of recipe quickstart
JOB = Path(__file__).parents[2] / "jobs" / "train.py"
BARE = """
import torch
from ray_det.config import ModelConfig
from ray_det.models.build import build_detector
from ray_det.models.detector import Batch
from ray_det.types import ClassList

detector, _ = build_detector(ModelConfig(name={model!r}, weights="none"), ClassList(("a", "b", "c"), (1, 2, 3)))
detector.train()
optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
size = (192, 192)
target = {{"boxes": torch.tensor([[10.0, 10, 90, 90]]), "labels": torch.tensor([1])}}
images, mask = torch.zeros(4, 3, *size, dtype=torch.uint8), torch.ones(4, *size, dtype=torch.bool)
batch = Batch(images, mask, [size] * 4, [target] * 4)
detector.loss(batch)["loss"].backward()
optimizer.step()
"""


class Config(Bench):
    model: str = Field(default="torchvision/fcos_mobilenet_v3_small_fpn", description="model.name")
    timeout_s: float = Field(default=120, description="seconds after which a start counts as failed")


def run(config: Config) -> Iterator[Figure]:
    with TemporaryDirectory() as storage:
        number, waits = count(), list[float]()  # the first draws the embedded data set; it is the warm-up
        ours = Arm("jobs/train.py", lambda: first_step_s(config, Path(storage), f"run{next(number)}", waits))
        bare = Arm("bare script", lambda: bare_s(config), {"what": "imports, model, one step; no data, one process"})
        yield compare("time to the first step", "s", ours, bare, repeats=config.repeats, target="<= 15")
        first, settings = waits[1:], {"when": "its model is built, its loaders are started"}
        name = "first batch of a run, waited for in the train worker"
        yield Figure(name, "s", "jobs/train.py", statistics.median(first), first, settings, target="<= 1.5")


def first_step_s(config: Config, storage: Path, name: str, waits: list[float]) -> float:
    """Until metrics.jsonl has its first line; the run is stopped then. `waits` gets how long it waited for its data."""
    command = [sys.executable, str(JOB), "--recipe", "quickstart", "--model.name", config.model]
    command += ["--wandb.mode", "disabled", "--storage", str(storage), "--name", name]
    log, said = storage / name / "metrics.jsonl", storage / f"{name}.log"
    began = time.monotonic()
    with said.open("w") as errors:
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=_env())
    try:
        while not (log.exists() and log.stat().st_size):
            if job.poll() is not None:
                last = said.read_text().strip().rpartition("\n")[2]
                raise UserError(f"the job ended before its first step, status {job.returncode}: {last}")
            if time.monotonic() - began > config.timeout_s:
                raise UserError(f"the job made no step within --timeout_s {config.timeout_s:g}")
            time.sleep(0.02)
        seconds = time.monotonic() - began
        step = json.loads(log.read_text().splitlines()[0])
        waits.append(step["train/data_wait_share"] * BATCH / step["train/images_per_s"])
        return seconds
    finally:
        job.send_signal(signal.SIGTERM)
        job.wait()


def bare_s(config: Config) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", BARE.format(model=config.model)], check=True, env=_env())
    return time.monotonic() - began


def _env() -> dict[str, str]:
    """Without the variable that would keep Python from using bytecode."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
