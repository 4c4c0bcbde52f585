"""A wandb server that refuses, is overloaded, breaks down or hangs: training neither fails nor waits for it."""

from __future__ import annotations

import time

import pytest

from tests.report.test_tracker import alone, rows, start, steps, train
from tests.report.wandb_server import HANG, wandb_server

__all__ = ["alone"]  # a fixture

FAILURES = pytest.mark.parametrize("status", [401, pytest.param(429, marks=pytest.mark.slow), 500, HANG])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setattr("ray_det.report.wandb_run.INIT_TIMEOUT_S", 2.0)
    monkeypatch.setattr("ray_det.report.wandb_run.FINISH_TIMEOUT_S", 2.0)
    with wandb_server() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        yield running


def run(folder, server, status, fails_at: int) -> float:
    """Ten steps; -> seconds that they and the end took."""
    if fails_at == 0:
        server.fails_with = status
    tracker = start(folder, "online")
    began = time.monotonic()
    for step in range(1, 11):
        if step == fails_at:
            assert tracker.url is not None
            server.fails_with = status
        train(tracker, step, step)
    tracker.finish()
    return time.monotonic() - began


@FAILURES
def test_a_server_that_fails_from_the_start_means_offline(status, server, tmp_path, caplog):
    assert run(tmp_path, server, status, fails_at=0) < 30
    assert server.requests and "offline instead" in caplog.text
    assert steps(rows(tmp_path)) == list(range(1, 11))


@FAILURES
def test_a_server_that_fails_later_costs_nothing(status, server, tmp_path):
    """The local copy is complete; `wandb sync` brings it to the server later."""
    assert run(tmp_path, server, status, fails_at=4) < 30
    assert steps(rows(tmp_path)) == list(range(1, 11))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) >= 10
