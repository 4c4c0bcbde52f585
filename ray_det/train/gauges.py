"""A run's numbers as Prometheus gauges, on the metrics endpoint of each Ray node, where their names begin with `ray_`.

They are the numbers of the run's records, shown once more; nothing is computed for them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.util.metrics import Gauge

INTERVAL_S = 5.0
"""Seconds between looks at what is to be shown. Ray exports every ten, and forgets what was not set anew in between."""

OF_RUN = {
    "global_step": ("det_global_step", "optimizer steps done"),
    "train/epoch": ("det_epoch", "epoch, from 0"),
    "train/batch_loss": ("det_loss", "loss of the last step, mean over the global batch"),
    "train/learning_rate": ("det_learning_rate", "learning rate of the last step"),
    "train/grad_norm": ("det_grad_norm", "global norm of the gradient before clipping"),
    "train/images_per_s": ("det_images_per_second", "images per second of the last step, over all workers"),
    "train/padded_share": ("det_padded_share", "share of padded pixels in the last global batch"),
    "train/skipped_steps": ("det_skipped_steps", "steps left out for a loss or gradient that was not finite"),
    "train/gpu_memory_gb": ("det_gpu_memory_gb", "most memory of rank 0's GPU that torch has used, GiB"),
    "val/loss": ("det_val_loss", "loss on val at the last validation"),
    "val/AP": ("det_val_ap", "COCO AP on val at the last validation"),
    "test/AP": ("det_test_ap", "COCO AP on test"),
    "started_at": ("det_start_timestamp_seconds", "when these workers began, seconds since 1970"),
    "checkpoint_at": (
        "det_checkpoint_timestamp_seconds",
        "when the last checkpoint was kept, or else when these workers began, seconds since 1970",
    ),
}
"""Rank 0's: keys of its records, with the names and descriptions that they are shown by."""

OF_RANK = {
    "step_s": ("det_step_seconds", "seconds of the last step, with the wait for its data"),
    "data_wait_share": ("det_data_wait_share", "share of the last step spent waiting for data"),
}
"""Every rank's own."""


class Gauges:
    """What one rank of a run shows.

    Args:
        run: the tag of all.
    """

    def __init__(self, run: str, rank: int) -> None:
        self._gauges = _gauges(OF_RANK, {"run": run, "rank": str(rank)}) | _gauges(OF_RUN, {"run": run})
        self._latest: dict[str, float] = {}
        self._lock = threading.Lock()

    def publish(self, numbers: Mapping[str, Any]) -> None:
        """Show these from now on; it only notes them. Other keys, and what is not finite, are passed over."""
        known = {
            key: float(value)
            for key, value in numbers.items()
            if key in self._gauges and value is not None and math.isfinite(value)
        }
        with self._lock:
            self._latest |= known

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Until the end of the block, by a thread: a step does not wait for it, and a step that hangs stays visible."""
        ended = threading.Event()

        def show() -> None:
            while not ended.wait(INTERVAL_S):
                self._set()

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._set()

    def _set(self) -> None:
        with self._lock:
            latest = dict(self._latest)
        for key, value in latest.items():
            self._gauges[key].set(value)


def short_name(uri: str) -> str:
    """A run in tags and logs: the last two parts of its folder's URI, `runs/cells` or `sweep/trial_003`."""
    return "/".join(uri.rstrip("/").split("/")[-2:])


def _gauges(named: dict[str, tuple[str, str]], tags: dict[str, str]) -> dict[str, Gauge]:
    return {
        key: Gauge(name, description=text, tag_keys=tuple(tags)).set_default_tags(tags)
        for key, (name, text) in named.items()
    }
