"""`jobs/bench.py ingest`: its rate is fair to loaders that deliver several batches at once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ray_det import cli
from ray_det.bench import ingest, plan
from ray_det.types import UserError


def arrivals(rng: np.random.Generator, batches: int, at_once: int) -> np.ndarray:
    """Seconds at which batches come, in order, of two loaders that take about a second for each and hand over some at
    once; the first tasks are small.
    """
    free = [0.0, 0.0]
    came: list[float] = []
    size = 1
    while len(came) < batches:
        size_now = min(size, batches - len(came))
        free[0] += size_now * rng.uniform(0.9, 1.1)
        ready = max(free[0], came[-1] if came else 0)
        came += [ready + 1e-3 * i for i in range(size_now)]
        size = min(2 * size, at_once)
        free.sort()
    return np.array(came)


@pytest.mark.parametrize(("batches", "at_once"), [(32, 1), (64, 1), (64, 3), (64, 8), (256, 8), (253, 8)])
def test_the_rate_of_bursts_and_of_even_arrivals(monkeypatch: pytest.MonkeyPatch, batches, at_once) -> None:
    rng = np.random.default_rng(0)
    epoch = [(np.zeros((4, 1)),)] * batches
    rates = []
    for _ in range(100):
        clock = iter(arrivals(rng, batches, at_once))
        monkeypatch.setattr(ingest, "time", SimpleNamespace(perf_counter=lambda clock=clock: next(clock)))
        rates.append(ingest._rate(lambda: epoch))
    assert np.mean(rates) == pytest.approx(8, rel=0.03)  # two loaders, a batch of 4 in a second each


def test_a_last_batch_that_is_smaller_counts_its_images() -> None:
    assert ingest.steady_rate(np.array([1.0, 2, 3]), np.array([4, 4, 4])) == pytest.approx(4)
    assert ingest.steady_rate(np.array([1.0, 2, 2.5]), np.array([4, 4, 2])) == pytest.approx(4)


def test_an_epoch_of_few_batches_has_no_rate() -> None:
    config = ingest.Config(batches=(4, 64), epoch_images=64, parts=("stream",))
    with pytest.raises(UserError, match="--epoch_images 64: expected >= 2048"):
        next(ingest.run(config))


@pytest.mark.parametrize("module", [ingest, plan])
def test_a_part_that_there_is_not(module) -> None:
    with pytest.raises(UserError, match="--parts: expected list of .*, got 'bogus'"):
        cli.parse(module.Config, ["--parts", "bogus"], description="")
