"""What only workers make, made once before anything is deleted for it."""

from __future__ import annotations

import ray

from ray_det.config import TrainJobConfig
from ray_det.types import ClassList, UserError, unwrapped


def require_model(config: TrainJobConfig, classes: ClassList, gpu: bool) -> None:
    """Build the network and its optimizer in a process of the cluster: the driver of a run does without torch.

    Args:
        gpu: whether workers have one.

    Raises:
        UserError: they cannot be built.
    """
    try:
        ray.get(ray.remote(_build).remote(config, classes, gpu))
    except UserError as error:
        raise unwrapped(error) from None


def _build(config: TrainJobConfig, classes: ClassList, gpu: bool) -> None:
    from ray_det.train.opening import build_network
    from ray_det.train.optim import build_optimizer

    build_optimizer(config.optim, build_network(config, classes, gpu)[0])
