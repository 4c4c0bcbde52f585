"""The end of a run: the test split with the best weights, summary.json, report.html."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray_det.report.metrics_file import read_records
from ray_det.report.page import write_page
from ray_det.train.checkpoint import Checkpoint
from ray_det.train.evaluation import evaluate_split
from ray_det.train.session import BEST, Session


def finish(session: Session) -> None:
    """Test with the best weights, then write what is read after a run; all ranks call it."""
    with TemporaryDirectory() as temporary:
        best = _best(session, Path(temporary))
    last = _last_evaluation(session)
    if session.runtime.is_main:
        summary = last | _summary(session, best)
        (session.runtime.folder / "summary.json").write_text(json.dumps(summary, indent=1))
        write_page(session.runtime.folder)
        shutil.rmtree(session.runtime.folder / "staging", ignore_errors=True)


def _last_evaluation(session: Session) -> dict[str, float]:
    """Of test, or of val where there is no test: the numbers, with those of an analysis, and its files."""
    split = next((split for split in ("test", "val") if split in session.job.manifests), None)
    if split is None:
        return {}
    if session.runtime.is_main:
        session.runtime.notify({"phase": "testing"})
    metrics = {f"{split}/{name}": value for name, value in evaluate_split(session, split, analysed=True).items()}
    if session.tracker and split == "test":
        session.tracker.log_test(session.state.global_step, metrics)
    return metrics


def _best(session: Session, temporary: Path) -> Checkpoint:
    """Load the best weights into the detector that is evaluated."""
    local = (session.job.run / BEST).local
    if local is None:
        session.job.run.download(temporary / BEST, BEST)
    best = Checkpoint.open(local or temporary / BEST)
    best.load_model(session.evaluated)
    return best


def _summary(session: Session, best: Checkpoint) -> dict[str, Any]:
    """The final numbers: val of the best epoch, and what all of the run took, over its restarts."""
    state, job, first_step_at = session.state, session.job, session.clock.first_step_at
    records = list(read_records(session.runtime.folder / "metrics.jsonl"))
    epochs = [r for r in records if "train/epoch_avg_loss" in r and r["global_step"] == best.state.global_step]
    val = {k: v for k, v in epochs[-1].items() if k.startswith("val/")} if epochs else {}
    return val | {
        "finished": True,
        "epochs": job.config.train.epochs,
        "epochs_done": state.epoch,
        "best_step": best.state.global_step,
        "global_step": state.global_step,
        "skipped_steps": state.skipped_steps,
        "skipped_images": state.skipped_images,
        **_speed(records, job.config.train.global_batch_size),
        "padded_share": state.padded_sum / max(state.global_step, 1),
        "time_to_first_step_s": first_step_at - job.started_at if first_step_at else None,
        "wall_s": time.time() - job.started_at,
    }


def _speed(records: list[dict[str, Any]], batch: int) -> dict[str, float | None]:
    """Images per second and share of time spent waiting for data, over all steps but the first."""
    steps = [r for r in records if "train/batch_loss" in r][1:]
    seconds = [batch / r["train/images_per_s"] for r in steps]
    waited = [r["train/data_wait_share"] * s for r, s in zip(steps, seconds, strict=True)]
    if not steps:
        return {"images_per_s": None, "data_wait_share": None}
    return {"images_per_s": batch * len(steps) / sum(seconds), "data_wait_share": sum(waited) / sum(seconds)}
