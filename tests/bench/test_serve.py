"""What `jobs/bench.py serve` says."""

from __future__ import annotations

import math

import pytest

from ray_det.bench.serve import Config, quantile, run


def test_quantiles():
    values = [i / 1000 for i in range(101, 0, -1)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1)) == (0.051, 0.1, 0.101)
    assert math.isnan(quantile([], 0.5))


@pytest.mark.ray
@pytest.mark.slow
def test_a_served_model_and_an_overload():
    config = Config(repeats=1, photos=4, image_size=96, clients=(2,), requests=20, overload=150)
    steady, overload = run(config)
    assert steady.value > 0 and steady.peer_value and 0 < steady.more["p50_s"] <= steady.more["p99_s"]
    statuses = overload.more["statuses"]
    assert set(statuses) == {"200", "503"} and sum(statuses.values()) == 750
