"""AdamW and its schedule. The learning rate is a pure function of the step, so no scheduler state can be lost."""

from __future__ import annotations

import math

import torch
from torch import nn

from ray_det.config import OptimConfig


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


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in one group or two (with and without weight decay)."""
    params = [p for p in model.parameters() if p.requires_grad]
    if config.decay_norms_and_biases:
        groups = [{"params": params}]
    else:
        groups = [  # norms and biases are what has one dimension
            {"params": [p for p in params if p.ndim > 1]},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
