"""AdamW and its schedule. The learning rate is a pure function of the step, so no scheduler state can be lost."""

from __future__ import annotations

import math

import torch
from torch import nn

from ray_det.config import OptimConfig
from ray_det.models.detector import Detector
from ray_det.models.parts import backbone_of


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of optimizer step `step` (from 0), or after the last one for `step = steps_per_epoch * epochs`.

    Cosine annealing (Loshchilov and Hutter, https://arxiv.org/abs/1608.03983), without restarts: at progress p in 0..1
    it is lr_min + (lr - lr_min) (1 + cos(pi p)) / 2. With `interval: epoch`, p stays the same within an epoch.
    """
    progress = step // steps_per_epoch / epochs if config.interval == "epoch" else step / (steps_per_epoch * epochs)
    rate = config.lr
    if config.schedule == "cosine":
        rate = config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * min(progress, 1))) / 2
    return rate * min(1, (step + 1) / config.warmup_steps) if config.warmup_steps else rate


def build_optimizer(config: OptimConfig, detector: Detector) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in as few groups as there are rates and decays; the main one comes first.

    A group's `lr_scale` is what the learning rate is multiplied by.

    Raises:
        UserError: a factor for the backbone of a model that has none.
    """
    factor, decay = config.backbone_lr_factor, config.weight_decay
    scaled = set(backbone_of(detector, "optim.backbone_lr_factor").parameters()) if factor != 1 else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(s, d): [] for s in (1.0, factor) for d in (decay, 0.0)}
    for parameter in detector.parameters():
        if parameter.requires_grad:
            decayed = config.decay_norms_and_biases or parameter.ndim > 1  # norms and biases have one dimension
            groups[factor if parameter in scaled else 1.0, decay if decayed else 0.0].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "lr": config.lr * scale, "lr_scale": scale, "weight_decay": decay}
            for (scale, decay), params in groups.items()
            if params
        ],
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
