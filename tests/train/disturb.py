"""A run that something happens to, and what it must be like in the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_det.report.wandb_log import read_history
from tests.models.zoo import FAMILIES
from tests.train.runner import records
from tests.train.test_equivalence import same_checkpoint

EPOCHS, STEPS = 4, 8  # 16 images in global batches of 2


def config(small_coco: dict[str, Path], storage: Path) -> dict[str, Any]:
    return {
        "name": "run",
        "storage": str(storage),
        "data": {split: str(path) for split, path in small_coco.items()} | {"image_size": 96},
        "model": FAMILIES["fcos"].model_dump(),
        "optim": {"ema_decay": 0.99},
        "train": {"epochs": EPOCHS, "global_batch_size": 2, "precision": "fp32", "checkpoint_every_steps": 5},
        "eval": {"every_epochs": 2},
        "workers": {"threads": 1},
        "wandb": {"mode": "offline"},
    }


def write(asked: dict[str, Any], folder: Path | None = None) -> Path:
    """To a file in a new folder, by default the storage."""
    folder = folder or Path(asked["storage"])
    folder.mkdir(parents=True)
    file = folder / "config.json"  # JSON is YAML
    file.write_text(json.dumps(asked))
    return file


def require_same(run: Path, undisturbed: Path, order: Callable[[list[Any]], list[Any]] = list) -> None:
    """Bit-equal weights and log; in wandb's files one run and every step once."""
    assert order(records(run)) == order(records(undisturbed))
    same_checkpoint(run / "best", undisturbed / "best")
    same_checkpoint(newest(run), max((undisturbed / "kept").glob("*_test")))
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1
    steps = [row["_step"] for file in files for row in read_history(file) if "train/batch_loss" in row]
    assert steps == [record["global_step"] for record in records(run) if "train/batch_loss" in record]


def steps_done(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_text().count("train/batch_loss") if log.exists() else 0


@contextmanager
def when_at(run: Path, step: int, act: Callable[[], Any]) -> Iterator[list[Any]]:
    """Act once the run has logged a step; gives the list that will hold what `act` returned."""
    results: list[Any] = []

    def watch() -> None:
        while not ended.is_set() and steps_done(run) < step:
            time.sleep(0.01)
        if not ended.is_set():
            results.append(act())

    ended = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield results
    finally:
        ended.set()
        watcher.join()


def newest(run: Path) -> Path:
    return max(run.glob("checkpoint_*/state.json"), key=lambda file: file.stat().st_mtime).parent
