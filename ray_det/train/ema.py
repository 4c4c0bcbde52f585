"""An exponential moving average of the weights, which is evaluated in place of them where it is on."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from ray_det.models.detector import Detector
from ray_det.train.tensors import by_dtype, copy_all


def decay_after(updates: int, decay: float, warmup_steps: int) -> float:
    """What update `updates` (from 1) leaves of the average, a share: decay (1 - exp(-updates / warmup_steps)).

    The warm-up is that of RT-DETR (arXiv:2304.08069) and Ultralytics, over 2000 steps, and of D-FINE, over 1000:
    without it, the weights of the beginning would stay for 1 / (1 - decay) steps.
    """
    return decay * (1 - math.exp(-updates / warmup_steps)) if warmup_steps else decay


class Ema:
    """A copy of a detector that follows the one in training: parameters as their average, buffers as they are.

    Args:
        detector: in training, on its device.
        updates: steps that are done, where a run goes on.
    """

    def __init__(self, detector: Detector, decay: float, warmup_steps: int, updates: int = 0) -> None:
        self.detector: Detector = copy.deepcopy(detector).eval().requires_grad_(False)
        self.updates = updates
        self._decay = decay
        self._warmup_steps = warmup_steps
        pairs = list(zip(self.detector.parameters(), detector.parameters(), strict=True))
        self._averages: list[Tensor] = [average for average, weight in pairs if weight.requires_grad]
        self._weights: list[Tensor] = [weight for _, weight in pairs if weight.requires_grad]
        self._buffers = by_dtype(self.detector.buffers()), by_dtype(detector.buffers())

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        self.updates += 1
        decay = decay_after(self.updates, self._decay, self._warmup_steps)
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        copy_all(*self._buffers)
