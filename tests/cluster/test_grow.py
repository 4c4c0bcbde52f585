"""A cluster without workers, and an autoscaler: a run gets the nodes that it asks for, and then they go."""

from __future__ import annotations

import time

import pytest

from tests.cluster.running import cluster
from tests.train.disturb import config, write


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_asks_for_its_nodes(small_coco, tmp_path):
    asked = config(small_coco, tmp_path / "runs")
    asked["train"] |= {"epochs": 1, "micro_batch_size": 1}
    asked["workers"] |= {"num": 2, "start_timeout_s": 180}
    with cluster(tmp_path, workers=0, cpus=2, may_add=3) as running:
        log = running.submit("train", "--config", write(asked, tmp_path / "asked"), "--name", "run")
        assert "'train-run-1' succeeded" in log, log
        deadline = time.monotonic() + 120
        while "2.0/" in (nodes := running.ray("status")) or "1 worker" in nodes:
            assert time.monotonic() < deadline, nodes
            time.sleep(2)
