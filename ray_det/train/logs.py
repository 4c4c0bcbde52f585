"""What a rank logs: one JSON object per line, which Ray Train writes to `logs/train/ray-train-app-worker-*.log`.

Every line, also of other libraries, says run, rank, epoch and step, beside what Ray adds: node, worker, actor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_det.train.watch import Watch

LOG = logging.getLogger("ray_det.train")


@contextmanager
def logging_of(run: str, rank: int, watch: Watch, tell: Callable[[str], None]) -> Iterator[None]:
    """Until the end of the block.

    Args:
        watch: knows where the rank is.
        tell: gets what this package's parts warn of on rank 0, for the driver to show it.
    """

    def place(record: logging.LogRecord) -> bool:
        record.__dict__.update(run=run, rank=rank, epoch=watch.epoch, step=watch.step)
        return True

    class ToDriver(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(record.getMessage())

    handlers, ours = list(logging.getLogger().handlers), logging.getLogger("ray_det")
    to_driver = ToDriver(logging.WARNING)
    for handler in handlers:
        handler.addFilter(place)
    if rank == 0:
        ours.addHandler(to_driver)
    try:
        yield
    finally:
        ours.removeHandler(to_driver)
        for handler in handlers:
            handler.removeFilter(place)
