"""A trace of some steps of rank 0 (`torch.profiler`), and the part of a step that each of its phases takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

PHASES = ("data wait", "copy to device", "forward", "criterion", "backward", "all-reduce", "optimizer", "logging")
"""Ranges that the loop and the detectors record. `criterion` lies in `forward`; the gradients' all-reduce overlaps with
`backward` and is waited for there, `all-reduce` is that of the logged numbers: mostly the wait for slower ranks."""
WAIT, WARM_UP = 5, 2  # steps that are passed over, and that the profiler warms up in


@contextmanager
def trace(folder: Path, active: int, steps: int, found: Callable[[dict[str, float]], None]) -> Iterator[Callable]:
    """Profile `active` of the `steps` that follow, after some that are passed over; gives what to call after each.

    Args:
        folder: gets `trace.json.gz` (for https://ui.perfetto.dev) and `split.json`.
        found: told milliseconds per step by phase.
    """

    def write(done: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(folder / "trace.json.gz"))
        split = split_of(done)
        (folder / "split.json").write_text(json.dumps(split, indent=1))
        found(split)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    wait = max(0, min(WAIT, steps - active - WARM_UP))
    plan = schedule(wait=wait, warmup=WARM_UP, active=active, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as running:
        yield running.step


def split_of(done: profile) -> dict[str, float]:
    """Milliseconds per step: of the whole, of each phase on the host, and on a GPU the work that it gave to it."""
    events = {event.key: event for event in done.key_averages()}
    whole = events["ProfilerStep*"]
    split = {"step_ms": whole.cpu_time_total / whole.count / 1000}
    for phase in PHASES:
        event, name = events.get(phase), phase.replace(" ", "_").replace("-", "_")
        split[f"{name}_ms"] = event.cpu_time_total / whole.count / 1000 if event else 0.0
        if torch.cuda.is_available():
            split[f"{name}_device_ms"] = event.device_time_total / whole.count / 1000 if event else 0.0
    split["forward_ms"] -= split["criterion_ms"]
    return split
