"""What rank 0 records of a run: `metrics.jsonl`, pictures, and a wandb run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray_det.config import WandbConfig
from ray_det.report.metrics_file import Kind, MetricsFile, Record, read_records
from ray_det.report.pictures import Picture, draw, to_jpeg
from ray_det.report.wandb_run import WandbRun
from ray_det.retry import PATIENCE_S, patiently


class Tracker:
    """Records of one run, under the run folder's local copy. Use on rank 0 only, and `finish()` in a `finally`.

    Records are written to `metrics.jsonl` first. wandb gets each record once in the life of a run, also when steps are
    done again after a restart, and a failing wandb never stops training. A step's record waits for `flush`, or for
    whatever else is asked of the tracker: writing it takes one or two milliseconds, for which it is the caller who
    knows the time.

    Args:
        folder: local folder for `metrics.jsonl`, `pictures/` and `wandb/`; made where it is missing.
        run_name, run_id: name and id in wandb; the id stays the same for the life of the run.
        run_config: the resolved configuration.
        keep_lines: lines of `metrics.jsonl` that the restored checkpoint knew (`lines` when it was saved); the rest is
            cut, for these steps are done again. None: nothing was restored, the file starts empty.
        patience_s: seconds for which the disk may be full.
        publish: gets each record too, and at once.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        config: WandbConfig,
        run_name: str,
        run_id: str,
        run_config: dict[str, Any],
        *,
        keep_lines: int | None = None,
        patience_s: float = PATIENCE_S,
        publish: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(folder / "metrics.jsonl", keep_lines or 0, patience_s)
        self._patience_s = patience_s
        self._wandb = WandbRun(folder, config, run_name, run_id, run_config, read_records(self._file.path))
        self._publish = publish
        self._waiting: tuple[int, Mapping[str, Any]] | None = None
        self._finished = False

    @property
    def lines(self) -> int:
        """Lines in `metrics.jsonl`; a checkpoint keeps this number."""
        return self._file.lines

    @property
    def url(self) -> str | None:
        """Where wandb shows the run; None offline."""
        return self._wandb.url

    def log_step(self, global_step: int, record: Mapping[str, Any]) -> None:
        """The record of one optimizer step; `train/batch_loss` is part of it.

        Raises:
            ValueError: without `train/batch_loss`, the record could not be told from an epoch's after a restart.
        """
        if "train/batch_loss" not in record:
            raise ValueError(f"a step's record needs train/batch_loss, got {sorted(record)}")
        self.flush()
        self._waiting = global_step, record
        self._publish({"global_step": global_step, **record})

    def flush(self) -> None:
        """Write the record that waits, if there is one."""
        if self._waiting:
            waiting, self._waiting = self._waiting, None
            self._write("step", *waiting)

    def log_epoch(self, global_step: int, record: Mapping[str, Any]) -> None:
        """The record of an epoch that ended with `global_step`: `train/epoch_avg_loss`, `learning_rate`, `val/*`."""
        self._log("epoch", global_step, record)

    def log_test(self, global_step: int, record: Mapping[str, Any]) -> None:
        """The final `test/*` numbers."""
        self._log("test", global_step, record)

    def _log(self, kind: Kind, global_step: int, record: Mapping[str, Any]) -> None:
        self.flush()
        self._publish(self._write(kind, global_step, record))

    def _write(self, kind: Kind, global_step: int, record: Mapping[str, Any]) -> Record:
        written = self._file.append(global_step, record)
        self._wandb.send(kind, written)
        return written

    def log_pictures(self, global_step: int, pictures: list[Picture], names: Sequence[str]) -> None:
        """Pictures with boxes, to wandb and as JPEG files in `pictures/`, in place of the last ones.

        Call before the epoch's `log_epoch`: a restart takes an epoch whose record wandb has for done.
        """
        if not pictures:
            return
        self.flush()
        self._wandb.send_pictures(global_step, pictures, names)
        folder = self.folder / "pictures"
        folder.mkdir(exist_ok=True)
        old = set(folder.glob("step_*.jpg"))
        for i, picture in enumerate(pictures):
            path = folder / f"step_{global_step:08d}_{i:02d}_image_{picture.image_id}.jpg"
            patiently(partial(path.write_bytes, to_jpeg(draw(picture, names))), patience_s=self._patience_s)
            old.discard(path)
        for path in old:
            path.unlink()

    def finish(self, exit_code: int = 0) -> None:
        """Close the file and the wandb run; a second call does nothing."""
        if not self._finished:
            self._finished = True
            try:
                self.flush()
            finally:
                self._file.close()
                self._wandb.finish(exit_code)
