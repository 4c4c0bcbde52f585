"""What `jobs/bench.py serve` says."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from ray_det.bench import serve
from ray_det.bench.measure import Arm
from ray_det.bench.serve import Config, Load, quantile, run


def test_quantiles():
    values = [i / 1000 for i in range(101, 0, -1)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1)) == (0.051, 0.1, 0.101)
    assert math.isnan(quantile([], 0.5))


def test_latencies_are_of_the_counted_requests_and_settings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([[9.0] * 4, [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])  # a warm-up and two repetitions
    monkeypatch.setattr(serve, "ask", lambda url, pictures, clients, n: Load(1.0, next(answers), Counter({"200": n})))
    config = Config(requests=4, repeats=2)
    figure = serve._steady(config, "", [], 2, Arm("detector.predict", lambda: 1.0))
    assert (figure.more["p50_s"], figure.more["p99_s"]) == (4.0, 7.0)
    told = {"clients": 2, "requests": 4, "replicas": 1, "batch_size": 8, "batch_wait_s": 0.005}
    assert figure.settings.items() >= told.items()


@pytest.mark.ray
@pytest.mark.slow
def test_a_served_model_and_an_overload():
    config = Config(repeats=1, photos=4, image_size=96, clients=(2,), requests=20, overload=150)
    steady, overload = run(config)
    assert steady.value > 0 and steady.peer_value and 0 < steady.more["p50_s"] <= steady.more["p99_s"]
    statuses = overload.more["statuses"]
    assert set(statuses) == {"200", "503"} and sum(statuses.values()) == 750
