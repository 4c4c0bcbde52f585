"""What a checkpoint holds, and how it is read.

    model.safetensors   weights and buffers
    ema.safetensors     their moving average, where the run has one
    optimizer.pt        AdamW's state, read with weights_only=True
    state.json          everything else (`TrainState`, the run's configuration, classes, architecture, data hashes),
                        and the SHA-256 of the other files

It knows nothing of ranks: any world size can go on from it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_model

from ray_det.config import TrainJobConfig
from ray_det.models.build import build_detector
from ray_det.models.detector import Detector
from ray_det.types import ClassList, UserError

FORMAT = 1
LAST_FILE = "state.json"
"""Written last: a folder that has it is a whole checkpoint."""
MODEL, AVERAGE, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.pt"
Phase = Literal["train", "validate", "test"]


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. With the seed and the plan, this is the whole state of the data too."""

    phase: Phase = "train"
    epoch: int = 0
    step: int = 0  # steps of this epoch that are done
    global_step: int = 0  # optimizer steps that are done
    skipped_steps: int = 0  # of them, those left out for a loss or gradient that was not finite
    nonfinite_in_row: int = 0
    rollbacks: int = 0  # to an earlier checkpoint, each with a lower learning rate
    loss_sum: float = 0.0  # over the finite steps of this epoch
    loss_count: int = 0
    best_ap: float | None = None
    best_step: int | None = None
    best_epoch: int = 0  # epochs that were done at best_step
    log_lines: int = 0  # lines of metrics.jsonl
    padded_sum: float = 0.0  # padded shares of all steps so far
    skipped_images: int = 0  # training images so far that could not be loaded and were blank
    validating: dict[str, float] | None = None  # record of the epoch that is being validated in the background

    def has_next(self, config: TrainJobConfig) -> bool:
        """Whether there is an epoch to go: not after the last, nor where `gives_up` says so of those that are known."""
        known = self.epoch if self.validating is None else int(self.validating["train/epoch"])
        return self.epoch < config.train.epochs and not self.gives_up(config, known)

    def gives_up(self, config: TrainJobConfig, done: int) -> bool:
        """Whether `patience` epochs, of `done`, have brought no better AP than an earlier one's."""
        evaluated = done - done % config.eval.every_epochs
        known = bool(config.train.patience) and self.best_ap is not None
        return known and evaluated - self.best_epoch >= config.train.patience

    def next_epoch(self) -> TrainState:
        return replace(self, phase="train", epoch=self.epoch + 1, step=0, loss_sum=0.0, loss_count=0)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose state.json was read and understood, and whose other files are what was written."""

    folder: Path
    content: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Raises UserError: there is no checkpoint, or a broken one."""
        path = folder / "state.json"
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise UserError(f"checkpoint {folder} has format {content['format']}, this version reads {FORMAT}")
            opened = cls(folder, content)
            _ = opened.state, opened.config, opened.classes, content["architecture"], content["run_id"]
            sums = dict(content["sha256"])
        except FileNotFoundError:
            raise UserError(f"no checkpoint at {folder}: state.json is missing") from None
        except UserError:
            raise
        except Exception as error:  # whatever a hostile value does
            raise UserError(f"broken checkpoint: {path}: {_first_line(error)}") from None
        for name, expected in sums.items():
            if not (folder / name).is_file():
                raise UserError(f"broken checkpoint: {folder / name} is missing")
            if sha256(folder / name) != expected:
                raise UserError(f"broken checkpoint: {folder / name} is not as it was written (SHA-256 differs)")
        return opened

    @property
    def state(self) -> TrainState:
        return TrainState(**self.content["state"])

    @property
    def config(self) -> TrainJobConfig:
        return TrainJobConfig.model_validate(self.content["config"])

    @property
    def classes(self) -> ClassList:
        return ClassList.from_json(self.content["classes"])

    def load_model(self, detector: Detector) -> None:
        """The weights that are trained; in `best`, which cannot be trained on, those that were evaluated."""
        self._load(detector, MODEL)

    def load_average(self, detector: Detector) -> None:
        """Their moving average, where it has one; otherwise it begins with the detector as it is."""
        if AVERAGE in self.content["sha256"]:
            self._load(detector, AVERAGE)

    def _load(self, detector: Detector, name: str) -> None:
        path = self.folder / name
        try:
            load_model(detector, str(path))
        except Exception as error:  # as below
            raise UserError(f"broken checkpoint: {path}: {_first_line(error)}") from None

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's state, with the rate of its last step; factors and decays stay as they were built.

        Raises:
            UserError: the file is broken, or is of other groups of parameters.
        """
        path = self.folder / OPTIMIZER
        own = [dict(group) for group in optimizer.param_groups]
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            counts = [len(group["params"]) for group in saved["param_groups"]]
            if counts != [len(group["params"]) for group in own]:
                raise UserError(
                    f"the optimizer of {self.folder} has other groups of parameters: what is frozen, what decays and "
                    "whether the backbone has a rate of its own cannot change in a run"
                )
            optimizer.load_state_dict(saved)
        except UserError:
            raise
        except Exception as error:  # torch raises many kinds for a broken or hostile file
            raise UserError(f"broken checkpoint: {path}: {_first_line(error)}") from None
        for group, built in zip(optimizer.param_groups, own, strict=True):
            group.update({name: value for name, value in built.items() if name not in ("params", "lr")})

    def build(self, device: torch.device) -> Detector:
        """The detector as it is evaluated: with the average of the weights, where there is one. Needs no network."""
        config = self.config
        detector, _ = build_detector(
            config.model, self.classes, padding=config.data.padding, architecture=self.content["architecture"]
        )
        self.load_model(detector)
        self.load_average(detector)
        return detector.to(device).eval()
