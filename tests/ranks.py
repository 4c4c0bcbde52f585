"""Plain gloo processes of a test: `run_ranks` starts them here, `process_group` is what each begins with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]


def run_ranks(module: str, argument: Path, world: int, timeout_s: float = 240) -> None:
    """Run `python -m module ARGUMENT RANK` for every rank to its end; all must succeed."""
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-m", module, str(argument)]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for rank in range(world)
    ]
    try:
        errors = [p.communicate(timeout=timeout_s)[1] for p in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [p.returncode for p in processes]
    assert not any(codes), "\n".join([f"exit statuses {codes}", *errors])


@contextmanager
def process_group(store: Path, rank: int, world: int) -> Iterator[dist.ProcessGroup | None]:
    """One torch thread and gloo; no group where there is one process."""
    torch.set_num_threads(1)
    if world == 1:
        yield None
        return
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    yield dist.group.WORLD
    dist.destroy_process_group()
