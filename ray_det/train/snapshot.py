"""How a checkpoint is written: a snapshot of what it will hold, then its files."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ray_det.models.detector import Detector
from ray_det.train.checkpoint import AVERAGE, FORMAT, LAST_FILE, MODEL, OPTIMIZER, Checkpoint, TrainState, sha256
from ray_det.train.job import RunFacts


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold. Without an optimizer it can be evaluated but not trained on."""

    weights: dict[str, dict[str, Tensor]]  # by file
    optimizer: dict[str, Any] | None
    architecture: dict[str, Any]
    state: TrainState
    facts: RunFacts

    @classmethod
    def of(
        cls,
        detector: Detector,
        optimizer: torch.optim.Optimizer | None,
        state: TrainState,
        facts: RunFacts,
        *,
        average: Detector | None = None,
        memory: HostMemory | None = None,
    ) -> Snapshot:
        """Of now. With `memory` its tensors are copied there, and training may go on while it is written."""
        detectors = {MODEL: detector} | ({AVERAGE: average} if average is not None else {})
        weights = {name: _each_once(module.state_dict()) for name, module in detectors.items()}
        moments = optimizer.state_dict() if optimizer is not None else None
        if memory is not None:
            weights = {name: memory.copy(name, tensors) for name, tensors in weights.items()}
        if memory is not None and moments is not None:
            per_parameter = {i: memory.copy(f"{OPTIMIZER} {i}", tensors) for i, tensors in moments["state"].items()}
            moments = {"state": per_parameter, "param_groups": deepcopy(moments["param_groups"])}
        if memory is not None:
            memory.wait()
        return cls(weights, moments, detector.architecture, state, facts)

    def write(self, folder: Path) -> None:
        """Write it in place of the folder.

        Raises:
            OSError: the disk is full, or broken.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            for name, tensors in self.weights.items():
                save_file(tensors, folder / name)
            if self.optimizer is not None:
                torch.save(self.optimizer, folder / OPTIMIZER)
        except (SafetensorError, RuntimeError) as error:  # as which both libraries report a full disk
            copies = len(self.weights) + 2 * (self.optimizer is not None)
            size = sum(t.nbytes for t in self.weights[MODEL].values()) * copies
            if (free := shutil.disk_usage(folder).free) > size:
                raise
            raise OSError(f"no space left: a checkpoint takes {size >> 20} MiB, {free >> 20} MiB are free") from error
        content = {
            "format": FORMAT,
            "state": asdict(self.state),
            "config": self.facts.config,
            "classes": self.facts.classes.to_json(),
            "architecture": self.architecture,
            "data_hashes": self.facts.data_hashes,
            "run_id": self.facts.run_id,
            "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir())},
        }
        (folder / LAST_FILE).write_text(json.dumps(content, indent=1))


def write_evaluated(checkpoint: Checkpoint, state: TrainState, folder: Path) -> None:
    """Write, in place of the folder, what of a checkpoint is evaluated.

    Raises:
        OSError: the disk is full, or broken.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sums = checkpoint.content["sha256"]
    name = AVERAGE if AVERAGE in sums else MODEL
    shutil.copyfile(checkpoint.folder / name, folder / MODEL)
    content = checkpoint.content | {"state": asdict(state), "sha256": {MODEL: sums[name]}}
    (folder / LAST_FILE).write_text(json.dumps(content, indent=1))


def _each_once(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the further names of a tensor, which safetensors refuses; `load_model` knows them from the module."""
    found: dict[tuple[Any, ...], str] = {}
    for name, tensor in weights.items():
        found.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,), name)
    return {name: weights[name].contiguous() for name in found.values()}


class HostMemory:
    """Host memory that one snapshot after the other is copied to: to fill fresh memory takes several times as long."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, str], Tensor] = {}

    def copy(self, group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of a group's tensors, by the same names; those of the group's last call are overwritten.

        They come from a GPU without waiting: see `wait`.
        """
        copies = {}
        for name, tensor in tensors.items():
            known = self._copies.get((group, name))
            if known is None or known.shape != tensor.shape or known.dtype != tensor.dtype:
                known = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = self._copies[group, name] = known.copy_(tensor, non_blocking=True)
        return copies

    def wait(self) -> None:
        """Until all copies are whole."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
