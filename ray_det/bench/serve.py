"""Requests per second and latencies of a served model, beside the same detector called in a loop; and an overload.

Clients are threads of this process, on the same machine as the server: each sends its next photograph when the last one
is answered. In the overload they are more than the server takes, and what is refused is counted.
"""

from __future__ import annotations

import http.client
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.parse import urlsplit

import torch
from pydantic import Field

import ray_det
from ray_det.bench import photos
from ray_det.bench.measure import Arm, Bench, Figure, compare, single
from ray_det.cluster import cores
from ray_det.config import ModelConfig, TrainJobConfig
from ray_det.models.build import build_detector
from ray_det.serve.config import ServeConfig
from ray_det.train.checkpoint import TrainState
from ray_det.train.job import RunFacts
from ray_det.train.snapshot import Snapshot
from ray_det.types import ClassList, UserError

JOB = Path(__file__).parents[2] / "jobs" / "serve.py"
Count = Annotated[int, Field(ge=1)]


class Config(Bench):
    checkpoint: str | None = Field(default=None, description="run folder or checkpoint; default: random weights")
    model: str = Field(default="torchvision/fcos_mobilenet_v3_small_fpn", description="model.name of random weights")
    image_size: Count = Field(default=320, description="data.image_size of random weights, pixels")
    photos: Count = Field(default=32, description="drawn photographs, of COCO's sizes")
    clients: tuple[Count, ...] = Field(default=(1, 8), description="numbers of clients at once")
    requests: Count = Field(default=50, description="requests of a repetition, over all clients")
    overload: Count = Field(default=200, description="clients of the overload")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(default=8765, description="port of the server")
    timeout_s: float = Field(default=180, description="seconds after which a start counts as failed")


@dataclass(frozen=True)
class Load:
    """What the clients saw."""

    seconds: float
    latencies_s: list[float]  # of answers with status 200
    statuses: Counter[str]

    @property
    def rate(self) -> float:
        return len(self.latencies_s) / self.seconds


def run(config: Config) -> Iterator[Figure]:
    with TemporaryDirectory() as scratch:
        folder = photos.draw(Path(scratch) / "photos", photos.coco_sizes(config.photos)).parent
        pictures = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
        checkpoint = config.checkpoint or str(_random(config, Path(scratch) / "checkpoint"))
        torch.set_num_threads(cores())
        detector = ray_det.load(checkpoint)

        alone = {"threads": cores(), "requests": config.requests, "batch_size": 1}

        def loop() -> float:
            began = time.perf_counter()
            for i in range(config.requests):
                detector.predict([pictures[i % len(pictures)]])
            return config.requests / (time.perf_counter() - began)

        with _served(checkpoint, config, Path(scratch)) as url:
            for clients in config.clients:
                yield _steady(config, url, pictures, clients, Arm("detector.predict", loop, alone))
            yield _overload(config, url, pictures)


def _steady(config: Config, url: str, pictures: list[bytes], clients: int, peer: Arm) -> Figure:
    latencies: list[list[float]] = []
    seen: dict[str, object] = {"model": config.checkpoint or f"{config.model}, random, {config.image_size} px"}

    def served() -> float:
        load = ask(url, pictures, clients, config.requests)
        if load.statuses != {"200": config.requests}:
            raise RuntimeError(f"not all of {config.requests} requests were answered: {dict(load.statuses)}")
        latencies.append(load.latencies_s)
        return load.rate

    what = f"served, {clients} client{'s' if clients > 1 else ''}"
    ours = Arm("jobs/serve.py", served, _settings(clients, config.requests))
    figure = compare(what, "images/s", ours, peer, repeats=config.repeats, more=seen)
    counted = [s for run in latencies[1:] for s in run]  # the first is the warm-up's
    seen["p50_s"], seen["p99_s"] = quantile(counted, 0.5), quantile(counted, 0.99)
    return figure


def _overload(config: Config, url: str, pictures: list[bytes]) -> Figure:
    seen: dict[str, object] = {}

    requests = 5 * config.overload

    def served() -> float:
        load = ask(url, pictures, config.overload, requests)
        if (after := ask(url, pictures, 1, 1).statuses) != {"200": 1}:
            raise RuntimeError(f"the server does not answer after the overload: {dict(after)}")
        seen.update(statuses=dict(load.statuses), p99_s=quantile(load.latencies_s, 0.99))
        return load.rate

    what = f"served under overload, {config.overload} clients"
    arm = Arm("jobs/serve.py", served, _settings(config.overload, requests))
    return single(what, "images/s", arm, repeats=1, warm_up=False, more=seen)


def _settings(clients: int, requests: int) -> dict[str, Any]:
    """Of a repetition, and of the server, which is started with the defaults."""
    limits = {"replicas", "cpus", "gpus", "batch_size", "batch_wait_s", "max_ongoing_requests", "max_queued_requests"}
    return {"clients": clients, "requests": requests} | ServeConfig(checkpoint="").model_dump(include=limits)


def ask(url: str, pictures: list[bytes], clients: int, requests: int) -> Load:
    """Send so many requests, each of a picture; where the connection fails, the status is the error's name."""

    def client(number: int) -> list[tuple[str, float]]:
        answers = []
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        for i in range(number, requests, clients):
            began = time.perf_counter()
            try:
                connection.request("POST", "/predict", pictures[i % len(pictures)], {"Content-Type": "image/jpeg"})
                reply = connection.getresponse()
                reply.read()
                status = str(reply.status)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                status = type(error).__name__
            answers.append((status, time.perf_counter() - began))
        connection.close()
        return answers

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for part in pool.map(client, range(clients)) for answer in part]
    seconds = time.perf_counter() - began
    return Load(seconds, [s for status, s in answers if status == "200"], Counter(status for status, _ in answers))


def quantile(values: list[float], share: float) -> float:
    """Seconds, to a tenth of a millisecond; the nearest value from below."""
    return round(sorted(values)[int(share * (len(values) - 1))], 4) if values else math.nan


def _random(config: Config, folder: Path) -> Path:
    """A checkpoint whose weights say nothing, which costs as much as any until there are detections to sort."""
    classes = ClassList(tuple(f"class {i}" for i in range(photos.CLASSES)), tuple(range(photos.CLASSES)))
    model = ModelConfig(name=config.model, weights="none")
    detector, _ = build_detector(model, classes)
    run = TrainJobConfig.model_validate({"model": model, "data": {"image_size": config.image_size}})
    facts = RunFacts(run.model_dump(mode="json"), classes, {}, "random")
    Snapshot.of(detector, None, TrainState(), facts).write(folder)
    return folder


@contextmanager
def _served(checkpoint: str, config: Config, scratch: Path) -> Iterator[str]:
    """The URL of a server of its own, as the job starts it."""
    url, log = f"http://127.0.0.1:{config.port}", scratch / "server.log"
    command = [sys.executable, str(JOB), "--checkpoint", checkpoint, "--port", str(config.port)]
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")}
    with log.open("w") as out:
        job = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        deadline = time.monotonic() + config.timeout_s
        while not re.search("^serving ", log.read_text(), re.MULTILINE):
            if job.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"the server did not start: {log.read_text().strip()}")
            time.sleep(0.1)
        yield url
    finally:
        job.send_signal(signal.SIGTERM)
        job.wait()
