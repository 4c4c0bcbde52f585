"""How often the host waits for the accelerator, counted on a GPU by CUDA itself and elsewhere on a stand-in.

The stand-in is a tensor that claims to lie on a GPU and computes on the CPU: what moves between the two, and what
reads a value or a data-dependent shape from it, would have waited. As CUDA does (`torch.cuda.set_sync_debug_mode`) a
blocking copy to the device counts too: it waits for all that is queued before it.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "nms"}
"""Operators that read a value, or a number of elements, from the device."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def host_syncs(prepare: Callable[[torch.device], Callable[[], Any]]) -> Counter[str]:
    """Where one call waits for the device, and how often: "package/file.py:line" -> times.

    Args:
        prepare: builds all that is needed on the device and gives the call. It is called once before it is counted.
    """
    with _cuda() if torch.cuda.is_available() else _stand_in() as places:
        call = prepare(CUDA)
        call()
        places.clear()
        call()
        return Counter(places)


@contextmanager
def _cuda() -> Iterator[list[str]]:
    """CUDA's own count, by its warnings."""
    places: list[str] = []

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            places.append(f"{_short(filename)}:{lineno}")

    with warnings.catch_warnings(), mock.patch("warnings.showwarning", note):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _stand_in() -> Iterator[list[str]]:
    """`cuda` exists inside: tensors made there or sent there are stand-ins. In float32 only."""
    mode = _Watch()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([...], device="cuda") shows its copy to the device
    try:
        with (
            mock.patch("torch.cuda._lazy_init"),
            mock.patch("torch.Tensor.pin_memory", lambda tensor: tensor),
            mode,
        ):
            yield mode.places
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


class _OnDevice(Tensor):
    """A tensor of the CPU that says it lies on a GPU. To C++ it lies on "meta", whose backward needs no GPU."""

    held: Tensor
    device = CUDA  # pyright: ignore[reportAssignmentType]
    is_cuda = True  # pyright: ignore[reportAssignmentType]
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnDevice:
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, held.size(), device="meta", **shape)  # pyright: ignore
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("a stand-in outlived its count")

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.tensor(data, **{"dtype": self.dtype, "device": CUDA} | kwargs)

    def __getitem__(self, index: Any) -> Tensor:  # a list becomes a tensor on the device
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(p, device=CUDA) if isinstance(p, list) else p for p in parts))

    def tolist(self) -> Any:
        return self.cpu().tolist()


class _Watch(TorchDispatchMode):
    """Runs every operator on the CPU and notes the places of those that would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        on_device = any(isinstance(leaf, _OnDevice) for leaf in tree_leaves((args, kwargs)))
        self.places += [_place()] * _waits(func, args, kwargs, on_device)
        if target is not None:
            on_device = torch.device(target).type != "cpu"
            kwargs["device"] = CPU
        held_args, held_kwargs = tree_map_only(_OnDevice, lambda t: t.held, (args, kwargs))
        result = func(*held_args, **held_kwargs)
        if not on_device:
            return result
        result = tree_map_only(Tensor, _OnDevice, result)
        return return_and_correct_aliasing(func, args, kwargs, result)


def _waits(func: Any, args: Any, kwargs: dict[str, Any], on_device: bool) -> int:
    """How many times the operator would have waited."""
    name = func._schema.name.partition("::")[2]
    if name == "_to_copy" and kwargs.get("device") is not None:
        crosses = isinstance(args[0], _OnDevice) != (torch.device(kwargs["device"]).type != "cpu")
        return int(crosses and not kwargs.get("non_blocking"))
    if name == "copy_":
        crosses = isinstance(args[0], _OnDevice) != isinstance(args[1], _OnDevice)
        return int(crosses and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])))
    if name in INDEXING and isinstance(args[0], _OnDevice):
        indices = [index for index in args[1] if index is not None]
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        if name != "index" and len(masks) == 1 and args[2].numel() == 1:  # becomes masked_fill
            masks = []
        return len(masks) + sum(not isinstance(index, _OnDevice) for index in indices)
    return int(on_device and name in READS)


def _place() -> str:
    """The innermost line outside torch."""
    frame = sys._getframe(2)
    while frame.f_back and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"


def _short(filename: str) -> str:
    return "/".join(Path(filename).parts[-2:])
