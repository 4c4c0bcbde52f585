"""Many tensors at a time: torch's foreach functions take one kernel for a list where a loop takes one per tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ray_det.models.torchvision_backbones import FrozenBatchNorm

Lists = list[list[Tensor]]


def by_dtype(tensors: Iterable[Tensor]) -> Lists:
    """Lists of one type each: of mixed types, torch would take the tensors one by one."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault(tensor.dtype, []).append(tensor)
    return list(lists.values())


@torch.no_grad()
def copy_all(targets: Lists, sources: Lists) -> None:
    for target, source in zip(targets, sources, strict=True):
        torch._foreach_copy_(target, source)  # pyright: ignore[reportPrivateImportUsage]


class NormStatistics:
    """The running statistics of a model's batch norms, looked up once.

    Args:
        model: its frozen norms are left out, they never change.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._now = by_dtype(b for m in norms if not isinstance(m, FrozenBatchNorm) for b in m.buffers())
        self._kept = [[torch.empty_like(b) for b in buffers] for buffers in self._now]

    def keep(self) -> None:
        copy_all(self._kept, self._now)

    def put_back(self) -> None:
        """To what they were when last kept."""
        copy_all(self._now, self._kept)
