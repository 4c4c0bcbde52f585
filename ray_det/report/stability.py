"""How calm a training was: jumps of the batch loss, its spread, gradient norms, steps without a number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from scipy.ndimage import median_filter

from ray_det.report.metrics_file import Record

WINDOW = 51  # steps, centred; at the ends of a run the outermost loss stands for what is beyond
JUMP = 2.0


class Stability(NamedTuple):
    """Of one run; NaN where nothing was recorded."""

    largest_jump: float  # batch loss over its running median
    jumps_share: float  # of steps whose batch loss is above JUMP times its running median
    log_variance: float  # of the logarithm of the batch loss within an epoch; the median over epochs
    grad_norm_p50: float  # before clipping
    grad_norm_p95: float
    grad_norm_max: float
    nonfinite_steps: int  # loss or gradient; they change no weights


def stability_of(steps: Sequence[Record]) -> Stability:
    """
    Args:
        steps: the records of a run's optimizer steps, in their order.
    """
    finite = [record for record in steps if record["train/batch_loss"] is not None]
    ratios = loss_ratios([record["train/batch_loss"] for record in finite])
    epochs = groupby(finite, lambda record: record["train/epoch"])
    logs = [np.log([max(r["train/batch_loss"], 1e-12) for r in records]) for _, records in epochs]
    norms = [record["train/grad_norm"] for record in steps if record.get("train/grad_norm") is not None]
    p50, p95, top = np.percentile(norms, (50, 95, 100)) if norms else (np.nan,) * 3
    return Stability(
        float(ratios.max()) if len(ratios) else np.nan,
        float((ratios > JUMP).mean()) if len(ratios) else np.nan,
        float(np.median([log.var() for log in logs])) if logs else np.nan,
        float(p50),
        float(p95),
        float(top),
        max((record.get("train/skipped_steps", 0) for record in steps), default=0),
    )


def loss_ratios(losses: Sequence[float]) -> np.ndarray:
    """Each step's loss over the median of the WINDOW steps around it."""
    values = np.array(losses, float)
    return values / np.maximum(median_filter(values, WINDOW, mode="nearest"), 1e-12)
