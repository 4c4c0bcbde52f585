"""Two ranks: a micro-batch without boxes stops nobody, and the gradient is that of one process."""

from __future__ import annotations

import json
import math

import pytest

from tests.models.zoo import FAMILIES
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What both ranks saw, family by family; all families share one start of the processes."""
    folder = tmp_path_factory.mktemp("ddp")
    run_ranks("tests.models.ddp_worker", folder, world=2)
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_without_boxes_neither_hangs_nor_crashes(ranks, family):
    assert all(math.isfinite(loss) for rank in ranks for loss in rank[family]["losses"])
    assert ranks[0][family]["weight_sum"] == ranks[1][family]["weight_sum"]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_have_the_gradient_of_one(ranks, family):
    assert ranks[0][family]["gap"] < 1e-4
    assert ranks[1][family]["gap"] < 1e-4
