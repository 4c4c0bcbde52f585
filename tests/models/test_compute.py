"""A process that computes on CPUs keeps the memory of its tensors for the next ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ray_det.connect import LOCALLY

MEASURE = """
import resource, sys, threading, torch
from ray_det.models.compute import set_up_torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def steps():
    def step():
        tensors = [torch.ones(10 << 20) for _ in range(3)]  # 40 MiB each
    for _ in range(2):
        step()
    before = faults()
    for _ in range(4):
        step()
    print(faults() - before)

set_up_torch(1, None, torch.device(sys.argv[1]))
if sys.argv[2] == "thread":  # as Ray Train's workers do
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
else:
    steps()
"""
PAGES = 4 * 3 * (40 << 20) // 4096


def faults(device="cpu", where="main", **variables):
    """Pages that the system had to clear for four steps of three tensors."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", MEASURE, device, where]
    return int(subprocess.run(command, env=plain | variables, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_steps_after_the_first_two_take_no_new_memory():
    assert faults() < 0.5 * PAGES
    # As in the processes of a run on one machine.
    assert faults(where="thread", MALLOC_ARENA_MAX=LOCALLY["MALLOC_ARENA_MAX"]) < 0.5 * PAGES


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_it_is_left_alone_where_a_gpu_computes_or_somebody_has_decided_otherwise():
    assert faults("cuda") > 0.5 * PAGES
    assert faults(MALLOC_MMAP_THRESHOLD_="131072") > 0.5 * PAGES
