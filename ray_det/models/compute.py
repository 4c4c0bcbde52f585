"""How a process that computes with torch does it: threads, determinism, precision, memory."""

from __future__ import annotations

import ctypes
import os

import torch

MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),
    "MALLOC_TOP_PAD_": (-2, 64 << 20),
    "MALLOC_MMAP_THRESHOLD_": (-3, 1 << 30),
}
"""What a user would set in the environment -> the option of mallopt(3), as glibc's malloc.h numbers it, and the value
for which nothing is given back."""


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast: `auto` means where bf16 is fast, which is on CUDA and on CPUs with AMX tiles."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cpu._is_amx_tile_supported()
    return precision == "bf16"


def set_up_torch(threads: int, deterministic: bool | None, device: torch.device) -> None:
    """Set this process's threads, whether torch uses deterministic algorithms only (it warns where none exist), and
    let a process that computes on CPUs keep its memory.

    Args:
        deterministic: None: on CPUs.
    """
    on_cpu = device.type == "cpu"
    deterministic = on_cpu if deterministic is None else deterministic
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = not deterministic
    if on_cpu:
        keep_memory()


def keep_memory() -> None:
    """Let the C library keep what is freed, for the next tensors.

    glibc gives large blocks back to the system at once: every step then takes its activations page by page, each of
    which the system clears, which is 5 to 30 % of a step on CPUs. Memory stays at the peak of a step, where it gets
    anyway. In threads this holds for all blocks only if they share the main thread's arena (`MALLOC_ARENA_MAX=1` when
    the process starts). Whoever has set one of glibc's variables is not overruled.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or os.environ.keys() & {*MALLOC, "GLIBC_TUNABLES"}:
        return
    for option, value in MALLOC.values():
        mallopt(option, value)
