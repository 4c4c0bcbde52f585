"""What stays float32 under bfloat16 autocast: modules that must be exact, and layers that CPUs do badly in bfloat16.

Some are wrong with AMX. Where a convolution strides over columns and its answer has one, as on the coarse levels of a
narrow canvas, oneDNN 3.12 reads memory that nobody wrote: answers and the weights' gradient may be anything, as for
https://github.com/pytorch/pytorch/issues/169688. So may the latter of dilated depthwise convolutions; the answers of
4x4 patches of 16 or 24 channels are wrong.

Some are slow there. The backward pass of a depthwise convolution with strides or a kernel of 5x5 takes 4 to 18 times as
long in bfloat16 as in float32, group norm of a channels-last input 2 to 5 times, and that of attention 2 to 25 times:
each of its many small products allocates memory, for which threads wait for each other. Most else gains.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@cache
def in_full_precision(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward leaves the caller's autocast and takes its floating inputs as float32."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return kind.forward(self, *(as_float(a) for a in args), **{k: as_float(v) for k, v in kwargs.items()})

    return type(f"Exact{kind.__name__}", (kind,), {"forward": forward})


def as_float(value: Any) -> Any:
    """float32 in place of lower precisions, also inside lists and tuples."""
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    if isinstance(value, list | tuple):
        return type(value)(as_float(v) for v in value)
    return value


def keep_in_float32(network: nn.Module) -> None:
    """Let those layers leave a CPU's autocast. Weights and their names stay."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = Float32GroupNorm
        elif type(module) is nn.Conv2d and (_is_slow(module) or _is_wrong(module)):
            module.__class__ = Float32Conv2d
        elif type(module) is nn.Conv2d and module.stride[1] > 1:
            module.__class__ = ColumnsConv2d


def _is_slow(layer: nn.Conv2d) -> bool:
    return _is_depthwise(layer) and (layer.stride != (1, 1) or max(layer.kernel_size) > 3)


def _is_wrong(layer: nn.Conv2d) -> bool:
    patches = layer.kernel_size == layer.stride == (4, 4) and layer.in_channels > 3
    return patches or (_is_depthwise(layer) and layer.dilation != (1, 1))


def _is_depthwise(layer: nn.Conv2d) -> bool:
    return 1 < layer.groups == layer.in_channels


class Float32GroupNorm(nn.GroupNorm):
    """A group norm that a CPU computes in float32, whatever the precision around it.

    A group may have a single value, which `nn.functional.group_norm` refuses: FCOS with 32 channels has such groups
    where the top of its pyramid is one cell of one image. What the norm gives is its bias.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _autocast(input):
            return self._norm(input)
        return self._norm(input.float()).to(input.dtype)

    def _norm(self, input: Tensor) -> Tensor:
        cudnn = torch.backends.cudnn.enabled
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, cudnn)


class Float32Conv2d(nn.Conv2d):
    """A convolution that a CPU computes in float32; its answer has the precision around it."""

    def forward(self, input: Tensor) -> Tensor:
        return _in_float32(self, input) if _autocast(input) else super().forward(input)


class ColumnsConv2d(nn.Conv2d):
    """A convolution with strides, that a CPU computes in float32 where its answer has one column."""

    def forward(self, input: Tensor) -> Tensor:
        wrong = _autocast(input) and self._has_one_column(input.shape[-1])
        return _in_float32(self, input) if wrong else super().forward(input)

    def _has_one_column(self, width: int) -> bool:
        padding = 0 if isinstance(self.padding, str) else self.padding[1]  # PyTorch has no "same" with strides
        reach = self.dilation[1] * (self.kernel_size[1] - 1) + 1
        return width + 2 * padding < reach + self.stride[1]


def _in_float32(layer: nn.Conv2d, input: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        out = nn.Conv2d.forward(layer, input.float())
    return out.to(torch.get_autocast_dtype("cpu"))


def keep_attention_in_float32() -> None:
    """The same for the attention of all `transformers` models in this process, by the library's own interface."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module: nn.Module, query: Tensor, *given: Any, **more: Any) -> tuple[Tensor, None]:
        if not _autocast(query):
            return sdpa_attention_forward(module, query, *given, **more)
        with torch.autocast("cpu", enabled=False):
            given = tuple(as_float(one) for one in (query, *given))
            out, weights = sdpa_attention_forward(module, *given, **{k: as_float(v) for k, v in more.items()})
        return out.to(query.dtype), weights

    AttentionInterface.register("sdpa", attention)


def _autocast(input: Tensor) -> bool:
    return input.device.type == "cpu" and torch.is_autocast_enabled("cpu")
