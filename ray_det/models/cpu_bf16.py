"""Layers that stay float32 under bfloat16 autocast on CPUs, where PyTorch has only slow kernels for them.

On AMX the backward pass of a depthwise convolution with strides or a kernel of 5x5 takes 4 to 18 times as long in
bfloat16 as in float32, group norm of a channels-last input 2 to 5 times, and that of attention 2 to 25 times: each of
its many small products allocates memory, for which threads wait for each other. All else gains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def keep_in_float32(network: nn.Module) -> None:
    """Let these layers leave a CPU's autocast. Weights and their names stay."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = Float32GroupNorm
        elif type(module) is nn.Conv2d and _is_slow(module):
            module.__class__ = Float32Conv2d


def _is_slow(layer: nn.Conv2d) -> bool:
    depthwise = 1 < layer.groups == layer.in_channels
    return depthwise and (layer.stride != (1, 1) or max(layer.kernel_size) > 3)


class Float32GroupNorm(nn.GroupNorm):
    """A group norm that a CPU computes in float32, whatever the precision around it."""

    def forward(self, input: Tensor) -> Tensor:
        if not _autocast(input):
            return super().forward(input)
        return super().forward(input.float()).to(input.dtype)


class Float32Conv2d(nn.Conv2d):
    """A convolution that a CPU computes in float32; its answer has the precision around it."""

    def forward(self, input: Tensor) -> Tensor:
        if not _autocast(input):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            out = super().forward(input.float())
        return out.to(torch.get_autocast_dtype("cpu"))


def keep_attention_in_float32() -> None:
    """The same for the attention of all `transformers` models in this process, by the library's own interface."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module: nn.Module, query: Tensor, *given: Any, **more: Any) -> tuple[Tensor, None]:
        if not _autocast(query):
            return sdpa_attention_forward(module, query, *given, **more)
        with torch.autocast("cpu", enabled=False):
            given = tuple(_as_float(one) for one in (query, *given))
            out, weights = sdpa_attention_forward(module, *given, **{k: _as_float(v) for k, v in more.items()})
        return out.to(query.dtype), weights

    AttentionInterface.register("sdpa", attention)


def _as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _autocast(input: Tensor) -> bool:
    return input.device.type == "cpu" and torch.is_autocast_enabled("cpu")
