"""Figures of stability, of records whose figures are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ray_det.report.stability import loss_ratios, stability_of


def steps(losses: Sequence[float | None], norms: Sequence[float | None], per_epoch: int = 50) -> list[dict[str, Any]]:
    records, skipped = [], 0
    for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        skipped += loss is None
        record = {"global_step": i + 1, "train/batch_loss": loss, "train/epoch": i // per_epoch}
        records.append(record | {"train/grad_norm": norm, "train/skipped_steps": skipped})
    return records


def test_a_jump_is_measured_by_the_steps_around_it():
    losses: list[float | None] = [*[2.0] * 100, *[1.0] * 100]
    losses[150], losses[20], losses[170] = 5.7, 4.4, None
    found = stability_of(steps(losses, [1.0] * 200))
    assert found.largest_jump == pytest.approx(5.7)
    assert found.jumps_share == pytest.approx(2 / 199)
    assert found.nonfinite_steps == 1


def test_a_loss_that_falls_does_not_jump():
    losses = list(5 * np.exp(-np.arange(300) / 60))
    assert loss_ratios(losses).max() < 1.6
    assert stability_of(steps(losses, [1.0] * 300)).jumps_share == 0


def test_spread_is_within_epochs_and_norms_are_percentiles():
    rng = np.random.default_rng(0)
    levels = np.repeat([8.0, 2.0, 1.0, 0.5], 500)  # the fall between epochs does not count
    losses = [*map(float, levels * np.exp(rng.normal(0, 0.3, 2000)))]
    found = stability_of(steps(losses, range(1, 2001), per_epoch=500))
    assert found.log_variance == pytest.approx(0.09, rel=0.15)
    assert found.grad_norm_p50 == pytest.approx(1000, abs=2) and found.grad_norm_p95 == pytest.approx(1900, abs=2)
    assert found.grad_norm_max == 2000


def test_a_run_without_a_finite_step_has_no_figures():
    found = stability_of(steps([None, None], [None, None]))
    assert np.isnan(found.largest_jump) and np.isnan(found.grad_norm_p50) and found.nonfinite_steps == 2
    assert np.isnan(stability_of([]).jumps_share)
