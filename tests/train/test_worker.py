"""A rank's line to the driver."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray

from ray_det.train.worker import _Line


class Slow:
    """A board far away, of a run that is asked to stop."""

    def post(self, update: dict[str, Any]) -> bool:
        time.sleep(0.05)
        return True


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_stop_is_seen_where_steps_are_faster_than_answers():
    board: Any = ray.remote(Slow).options(num_cpus=0).remote()
    ray.get(board.post.remote({}))  # it has started
    line = _Line(board, look=False)
    for _ in range(500):
        line.notify({"global_step": 1})
        if line.asked().stop:
            return
        time.sleep(0.01)
    pytest.fail("500 steps, and it was not seen")
