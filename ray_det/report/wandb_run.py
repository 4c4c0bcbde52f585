"""One wandb run for the life of a training run: opened without ever prompting, and never a reason to stop.

How records become rows. wandb's own step must not go backwards and a row, once closed, takes nothing more. A step
record is logged with `step=global_step`, which leaves its row open until the next step; the epoch's records (logged
before that) go into the same row. Keys never collide, so no record is lost or merged away, each global step is one
row, and `global_step`, by which val/*, test/*, ... are charted, is right wherever such a record lands: after a restart
between the step and its validation that is a row of its own, or, online, the next open one. An epoch that was validated
in the background has its record in the row that is open by then.

Offline, each start adds a folder `wandb/offline-run-*-<id>`: `wandb sync --id <id> wandb/offline-run-*-<id>` makes one
run of them. `WANDB_MODE` in the environment counts where the configuration says `auto`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ray_det.config import WandbConfig
from ray_det.report.metrics_file import Kind, Record, kind_of
from ray_det.report.pictures import Picture
from ray_det.report.wandb_log import PICTURES, Sent, sent_before

log = logging.getLogger(__name__)
T = TypeVar("T")

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0
FLUSH_INTERVAL_S = 1.0
EPOCH_METRICS = ("val/*", "test/*", "train/epoch_avg_loss", "learning_rate")
WIDEST_PICTURE = 640  # pixels; wandb keeps every epoch's pictures
LOWEST_SCORE = 0.1  # of predictions that wandb is given; its page has a slider above that


class WandbRun:
    """See the module. Every failure of wandb is one warning; after it the object does nothing.

    Args:
        folder: absolute; wandb makes `wandb/` in it.
        known: records of steps that the restored checkpoint holds; those wandb lost in a kill are sent.
    """

    def __init__(
        self, folder: Path, config: WandbConfig, run_name: str, run_id: str, run_config: Record, known: Iterable[Record]
    ) -> None:
        self._run: Any = None
        self._sent = Sent()
        self._row = 0  # wandb's own step: of the row that is open
        mode = _mode(config)
        if mode == "disabled":
            return
        before = self._guard("reading its files", lambda: sent_before(folder / "wandb", run_id))
        self._open(folder, config, run_name, run_id, run_config, mode)
        if self._run is not None:
            self._guard("resuming", lambda: self._catch_up(before, list(known)))

    @property
    def url(self) -> str | None:
        """Where the run is seen; None offline."""
        return getattr(self._run, "url", None)

    def send(self, kind: Kind, record: Record) -> None:
        """Log a record unless wandb has it."""
        global_step = record["global_step"]
        if self._run is None or self._sent.has(kind, global_step):
            return
        row = {key: float("nan") if value is None else value for key, value in record.items()}
        if kind == "step":
            del row["global_step"]
        self._guard("logging", lambda: self._log(row, global_step))

    def send_pictures(self, global_step: int, pictures: list[Picture], names: Sequence[str]) -> None:
        """Log pictures with their predicted and true boxes as `val/pictures`."""
        if self._run is None or self._sent.has("epoch", global_step) or not pictures:
            return
        self._guard("logging pictures", lambda: self._log_pictures(global_step, pictures, names))

    def finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._guard("finishing", lambda: _finish(run, exit_code))

    def _log(self, row: Record, global_step: int) -> None:
        self._row = max(self._row, global_step, self._run.starting_step)
        self._run.log(row, step=self._row)

    def _open(self, folder: Path, config: WandbConfig, name: str, run_id: str, run_config: Record, mode: str) -> None:
        start = dict(id=run_id, name=name, config=run_config, dir=str(folder.absolute()))
        start |= dict(project=config.project, entity=config.entity, group=config.group)
        if mode in ("auto", "online"):
            has_key = self._guard("looking for an API key", _has_key)
            if has_key:
                self._run = self._guard("going online (offline instead)", lambda: _init("online", **start))
            elif mode == "online":
                log.warning("wandb: no API key found (WANDB_API_KEY or `wandb login`): logging offline")
        if self._run is None:
            self._run = self._guard("starting", lambda: _init("offline", **start))

    def _catch_up(self, before: Sent | None, known: list[Record]) -> None:
        """Settle what wandb has, then send what it lost. The server's word counts more than that of local files."""
        self._run.define_metric("global_step", hidden=True)
        for name in EPOCH_METRICS:
            self._run.define_metric(name, step_metric="global_step")
        if self._run.resumed:
            self._sent = _sent_to_server(self._run)
        elif before is not None:
            self._sent = before
        self._row = max(self._row, self._sent.through["step"])
        # With neither, what an earlier start logged offline is lost with its machine: all of it is sent.
        for record in known:
            self.send(kind_of(record), record)

    def _log_pictures(self, global_step: int, pictures: list[Picture], names: Sequence[str]) -> None:
        images = [_image(picture, names) for picture in pictures]
        self._log({PICTURES: images, "global_step": global_step}, global_step)

    def _guard(self, doing: str, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except Exception as error:  # wandb raises its own, pydantic's, OS and network errors
            what = str(error).strip().splitlines()
            log.warning("wandb: %s failed: %s: %s", doing, type(error).__name__, what[0] if what else "")
            self._run = None
            return None


def _mode(config: WandbConfig) -> str:
    named = os.environ.get("WANDB_MODE", "")
    return named if config.mode == "auto" and named in ("online", "offline", "disabled") else config.mode


def _has_key() -> bool:
    """Whether wandb would find credentials by itself, without a prompt."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb
    from wandb.sdk.lib.wbauth import read_netrc_auth

    settings = wandb.setup().settings
    return bool(settings.api_key or read_netrc_auth(host=settings.base_url))


def _init(mode: Any, **start: Any) -> Any:
    import wandb

    fields: dict[str, Any] = dict(
        silent=True,
        console="off",  # a worker's output is Ray's to handle
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,  # a dead network must not hold the end of a run
        reinit="create_new",  # never somebody else's open run
        x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
    )
    known = {key: value for key, value in fields.items() if key in wandb.Settings.model_fields}
    try:
        return wandb.init(**start, mode=mode, resume="allow", settings=wandb.Settings(**known))
    except Exception:
        wandb.teardown()  # its service would keep the id as in use
        raise


def _finish(run: Any, exit_code: int) -> None:
    import wandb

    run.finish(exit_code=exit_code)
    wandb.teardown()  # `finish` returns before the service has closed the run's file


def _sent_to_server(run: Any) -> Sent:
    sent = Sent()
    sent.add("step", run.starting_step - 1)
    epoch = run.summary.get("global_step")
    if epoch is not None:
        sent.add("epoch", int(epoch))
        if any(key.startswith("test/") for key in run.summary.keys()):
            sent.add("test", int(epoch))
    return sent


def _image(picture: Picture, names: Sequence[str]) -> Any:
    import wandb

    height, width = picture.pixels_HW3.shape[:2]
    stride = max(1, -(-max(height, width) // WIDEST_PICTURE))

    def boxes(boxes_N4: Any, labels_N: Any, scores_N: Any = None) -> dict[str, Any]:
        data = []
        for i, (x0, y0, x1, y1) in enumerate(boxes_N4.tolist()):
            if scores_N is not None and scores_N[i] < LOWEST_SCORE:
                continue
            position = dict(minX=x0 / width, minY=y0 / height, maxX=x1 / width, maxY=y1 / height)
            label = int(labels_N[i])
            box = dict(position=position, class_id=label, box_caption=names[label])
            if scores_N is not None:
                box |= dict(scores={"score": float(scores_N[i])}, box_caption=f"{names[label]} {scores_N[i]:.2f}")
            data.append(box)
        return dict(box_data=data, class_labels=dict(enumerate(names)))

    both = dict(
        predictions=boxes(picture.boxes_N4, picture.labels_N, picture.scores_N),
        ground_truth=boxes(picture.true_boxes_N4, picture.true_labels_N),
    )
    pixels = picture.pixels_HW3[::stride, ::stride]
    return wandb.Image(pixels, boxes=both, caption=f"image {picture.image_id}", file_type="jpg")
