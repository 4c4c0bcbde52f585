"""Two ranks: a micro-batch without boxes stops nobody, and the gradient is that of one process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.zoo import FAMILIES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What both ranks saw, family by family; all families share one start of the processes."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.ddp_worker", str(folder)]
    processes = [subprocess.Popen([*command, str(r)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for r in range(2)]
    try:
        errors = [p.communicate(timeout=180)[1] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(p.returncode == 0 for p in processes), errors
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_without_boxes_neither_hangs_nor_crashes(ranks, family):
    assert all(math.isfinite(loss) for rank in ranks for loss in rank[family]["losses"])
    assert ranks[0][family]["weight_sum"] == ranks[1][family]["weight_sum"]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_have_the_gradient_of_one(ranks, family):
    assert ranks[0][family]["gap"] < 1e-4
    assert ranks[1][family]["gap"] < 1e-4
