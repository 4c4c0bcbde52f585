"""A training session in this process alone, without Ray, and the clock that waits for its device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ray_det.data.collate import Shard
from ray_det.train.job import Job
from ray_det.train.opening import open_session
from ray_det.train.session import Runtime, Session
from ray_det.train.step import Asked
from ray_det.types import MicroBatch


def open_alone(
    job: Job,
    threads: int,
    stream: Callable[[Shard], Iterator[MicroBatch]],
    commit: Callable[[Path, str], None] = lambda staged, name: None,
) -> Session:
    """A new session of a job whose run folder is local, on the GPU where there is one; see `Runtime`."""
    runtime = Runtime(
        rank=0,
        world=1,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        group=None,
        threads=threads,
        stream=stream,
        newest=lambda before: nullcontext(),
        commit=commit,
        notify=lambda update: None,
        asked=Asked,
        preempted=lambda: False,
        at=lambda phase, step, epoch: None,
        publish=lambda numbers: None,
        folder=Path(job.run.uri),
        kept=lambda name: nullcontext(Path(job.run.uri, name)),
    )
    return open_session(job, runtime, None)


def seconds(function: Callable[[], Any], device: torch.device, count: int = 1) -> float:
    """Of a call, divided by `count`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count
