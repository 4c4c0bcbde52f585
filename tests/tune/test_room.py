"""How many trials run at once, for clusters that are lists of nodes."""

from __future__ import annotations

import pytest

from ray_det.config import WorkersConfig
from ray_det.tune.room import make_room, trials_at_once
from ray_det.types import UserError


def at_once(nodes: list[tuple[float, float]], *, gpu: bool = False, **workers: float) -> int:
    resources = [{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes]
    return trials_at_once(resources, WorkersConfig.model_validate(workers), gpu=gpu)


def test_every_trial_has_its_workers_and_a_cpu_for_loaders():
    assert at_once([(2, 0)]) == 1
    assert at_once([(1, 0)]) == 0
    assert at_once([(8, 0)]) == 4
    assert at_once([(8, 0)], num=2) == 2  # 3 CPUs each
    assert at_once([(9, 0)], num=2) == 3
    assert at_once([(2, 0)], num=2) == 0
    assert at_once([(2, 0)], num=2, cpus=0.5) == 1
    assert at_once([(96, 8)], num=4, gpu=True) == 2
    assert at_once([(8, 8)], num=4, gpu=True) == 1  # GPUs for two, CPUs for the loaders of one


def test_workers_of_a_trial_may_be_on_several_nodes_but_a_worker_is_on_one():
    assert at_once([(0, 0), (1, 0), (2, 0), (2, 0)], num=2, cpus=2) == 1
    assert at_once([(1, 0), (1, 0), (1, 0)], num=1, cpus=2) == 0
    assert at_once([(3, 0), (3, 0), (3, 0)], num=3, cpus=2) == 1
    assert at_once([(16, 4), (16, 4), (32, 0)], num=4, gpu=True) == 2


def test_parts_of_cpus_on_several_nodes_are_not_taken_for_one():
    """Two workers of half a CPU, one on each node, leave two halves, on which no loader runs."""
    assert at_once([(1, 0), (1, 0)], num=2, cpus=0.5) == 0
    assert at_once([(2, 0), (1, 0)], num=2, cpus=0.5) == 1


def test_a_range_of_workers_is_refused():
    with pytest.raises(UserError, match="not a range"):
        make_room(WorkersConfig(num="1..2"), 4)
