"""One optimizer step over this rank's micro-batches of a global batch. Knows torch.distributed, not Ray.

Gradients and logged losses are means over all micro-batches of the global batch, whoever computes them: a micro-batch
is normalised by itself and its random numbers come from (seed, step, index), so the world size changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from ray_det.models.detector import Detector, to_device
from ray_det.train.ema import Ema
from ray_det.train.tensors import NormStatistics
from ray_det.types import MicroBatch


class Asked(NamedTuple):
    """What a rank wants of all ranks after a step. Told with the step's numbers, it costs nothing and reaches all."""

    stop: bool = False  # keep a checkpoint and end
    look: bool = False  # whether a node is about to be taken away


NOTHING = Asked()


@dataclass(frozen=True)
class StepResult:
    """What one step gave, the same on every rank."""

    loss: float  # mean over the global batch
    components: dict[str, float]  # of the loss, weighted
    grad_norm: float  # before clipping
    padded_share: float  # of the global batch's pixels
    applied: bool  # False: loss or gradient was not finite, and the weights were left alone
    asked: Asked  # by any rank
    skipped: int  # images of the global batch, and partners of these, that could not be loaded


def wrap_ddp(detector: Detector, device: torch.device) -> nn.Module:
    """The detector in DistributedDataParallel, or alone where there is one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return detector
    ids = [device.index or 0] if device.type == "cuda" else None
    return DistributedDataParallel(detector, device_ids=ids, gradient_as_bucket_view=True)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[MicroBatch],
    *,
    device: torch.device,
    clip_norm: float,
    seed: int,
    global_step: int,
    share: float | None = None,
    bf16: bool = False,
    asked: Asked = NOTHING,
    at: Callable[[str], None] = lambda phase: None,
    meanwhile: Callable[[], None] = lambda: None,
    norms: NormStatistics | None = None,
    ema: Ema | None = None,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, all-reduce, clip, update.

    A loss or gradient norm that is not finite on any rank makes every rank skip the update; batch norm statistics
    are put back too.

    Args:
        model: from `wrap_ddp`.
        optimizer: of all parameters that are trained.
        clip_norm: largest global norm of the gradient; 0: none.
        global_step: with `seed` and a micro-batch's index the source of the model's random numbers.
        share: micro-batches of the global batch / ranks; None: every rank has as many as this one.
        asked: by this rank; the result says it of all ranks.
        at: told what the step does next.
        meanwhile: called while the device works, before its numbers are waited for: what the host does between two
            steps, the device has nothing to do.
        norms: of the model; None: they are looked up for this step.
        ema: follows the update.
    """
    detector = model.module if isinstance(model, DistributedDataParallel) else model
    names = ("loss", *detector.loss_names)  # pyright: ignore[reportGeneralTypeIssues]
    share = share or len(micro_batches)
    norms = norms or NormStatistics(model)
    norms.keep()
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(len(names), device=device)
    at("forward and backward")
    for i, micro in enumerate(micro_batches):
        torch.manual_seed(step_seed(seed, global_step, micro.index))
        last = i == len(micro_batches) - 1
        sync = nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()
        if last:
            at("last backward, with the gradients' all-reduce")
        with sync:
            with record_function("copy to device"):
                batch = to_device(micro, device)
            with record_function("forward"), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                losses = model(batch)
            with record_function("backward"):
                (losses["loss"] / share).backward()
        total += torch.stack([losses[name].detach().float() for name in names]) / share
    norm = gradient_norm(optimizer)
    padded = sum(map(_padded_share, micro_batches)) / share
    skipped = sum(sum(map(bool, micro.skipped_B)) + len(micro.skipped_partners) for micro in micro_batches)
    more = torch.tensor([padded, skipped, *asked]).to(device, non_blocking=True)
    at("all-reduce of the losses")
    with record_function("all-reduce"):
        means = _mean_over_ranks(torch.cat([total, norm.reshape(1), more]))
    with record_function("logging"):
        meanwhile()
    with record_function("all-reduce"):
        values = means.tolist()
    components = dict(zip(names[1:], values[1:-5], strict=True))
    norm_value, padded, skipped, stop, look = values[-5:]
    applied = bool(np.isfinite(values).all())
    if applied:
        with record_function("optimizer"):
            update(optimizer, ema, clip_norm, norm, norm_value)
    else:
        norms.put_back()
    world, asked = dist.get_world_size() if dist.is_initialized() else 1, Asked(stop > 0, look > 0)
    return StepResult(values[0], components, norm_value, padded, applied, asked, round(skipped * world))


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Global L2 norm, a scalar on the device. The groups are lists, where a model's parameters are a walk over it."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


def update(
    optimizer: torch.optim.Optimizer, ema: Ema | None, clip_norm: float, norm: Tensor, norm_value: float
) -> None:
    """Clip to a global norm (0: not), change the weights, and let their average follow.

    Args:
        norm, norm_value: of the gradient, on the device and on the host.
    """
    if clip_norm and norm_value + 1e-6 > clip_norm:  # else torch would multiply everything by 1
        params = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(params, clip_norm, norm)
    optimizer.step()
    if ema:
        ema.update()


def _mean_over_ranks(values: Tensor) -> Tensor:
    """One collective for all that a step has to tell; float64, on the device. The norm is equal everywhere."""
    vector = values.double()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(vector)
        vector /= dist.get_world_size()
    return vector


def _padded_share(micro: MicroBatch) -> float:
    images, height, width = micro.pixels_BHW3.shape[:3]
    return 1 - float(micro.sizes_B2.prod(axis=1, dtype=np.int64).sum()) / (images * height * width)


def sync_buffers(detector: Detector) -> None:
    """Give every rank rank 0's batch norm statistics, so that all evaluate the model that a checkpoint holds."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in detector.buffers():
            dist.broadcast(buffer, 0)


def step_seed(seed: int, global_step: int, index: int) -> int:
    """Seed of torch's generators for one micro-batch."""
    return int(np.random.SeedSequence([seed, global_step, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
