"""Fair figures: two arms take turns in one run, and what counts is the median.

A machine's speed drifts, by what else runs on it and how warm it is: arms that take turns drift alike, so a figure's
ratio is the median of the ratios of neighbouring repetitions.
"""

from __future__ import annotations

import operator
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ray_det.config import Section

PACKAGES = ("torch", "torchvision", "transformers", "ray", "numpy", "opencv-python-headless", "simplejpeg")
_TARGET = re.compile(r"(>=|<=) ([\d.]+)(x?)")
_COMPARE = {">=": operator.ge, "<=": operator.le}


class Bench(Section):
    """The options that all sub-commands have."""

    repeats: Annotated[int, Field(ge=1)] = Field(default=5, description="repetitions of each arm, after a warm-up each")


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared."""

    name: str
    run: Callable[[], float]  # one repetition -> its value in the figure's unit
    settings: dict[str, Any] = field(default_factory=dict)  # JSON: all that a reader needs to judge whether it is fair


@dataclass(frozen=True)
class Figure:
    """A measured number; with a peer, a comparison."""

    figure: str
    unit: str
    arm: str
    value: float  # median of `values`
    values: list[float]
    settings: dict[str, Any]
    peer: str | None = None
    peer_value: float | None = None
    peer_values: list[float] = field(default_factory=list)
    peer_settings: dict[str, Any] = field(default_factory=dict)
    ratio: float | None = None  # value / peer's, median over the pairs
    target: str | None = None  # ">= 1.2x" of the ratio, "<= 15" of the value
    more: dict[str, Any] = field(default_factory=dict)  # JSON: what else was seen
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        sign, number, of_ratio = _target(self.target)
        measured = self.ratio if of_ratio else self.value
        return measured is not None and bool(_COMPARE[sign](measured, number))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def compare(
    figure: str,
    unit: str,
    ours: Arm,
    peer: Arm,
    *,
    repeats: int,
    warm_up: bool = True,
    target: str | None = None,
    more: dict[str, Any] | None = None,
) -> Figure:
    """Run two arms in turn, `repeats` times each.

    Args:
        warm_up: one more repetition of each before, not counted.
        target: ">= 1.2x" or "<= 0.3x" of the ratio ours / peer, or without x of our value.
        more: put into the figure.
    """
    _check(target)
    for arm in (ours, peer) if warm_up else ():
        arm.run()
    pairs = []
    for i in range(repeats):
        first, second = (ours, peer) if i % 2 == 0 else (peer, ours)  # neither always has the warmer machine
        values = {first.name: first.run(), second.name: second.run()}
        pairs.append((values[ours.name], values[peer.name]))
    own, others = [a for a, _ in pairs], [b for _, b in pairs]
    return Figure(
        figure,
        unit,
        ours.name,
        statistics.median(own),
        own,
        ours.settings,
        peer.name,
        statistics.median(others),
        others,
        peer.settings,
        statistics.median(a / b for a, b in pairs),
        target,
        more or {},
    )


def single(
    figure: str,
    unit: str,
    arm: Arm,
    *,
    repeats: int,
    warm_up: bool = True,
    target: str | None = None,
    more: dict[str, Any] | None = None,
) -> Figure:
    """A figure that has no peer; `warm_up`: one more repetition before, not counted."""
    _check(target)
    if warm_up:
        arm.run()
    values = [arm.run() for _ in range(repeats)]
    return Figure(
        figure, unit, arm.name, statistics.median(values), values, arm.settings, target=target, more=more or {}
    )


def table(figures: list[Figure]) -> str:
    """The figures for people."""
    rows = [("figure", "arm", "measured", "peer", "measured", "ratio", "target", "")]
    for f in figures:
        peer = "" if f.peer_value is None else f"{f.peer_value:.4g} {f.unit}"
        ratio = "" if f.ratio is None else f"{f.ratio:.2f}"
        verdict = {None: "", True: "met", False: "missed"}[f.met]
        rows.append((f.figure, f.arm, f"{f.value:.4g} {f.unit}", f.peer or "", peer, ratio, f.target or "", verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def machine() -> dict[str, Any]:
    """Where a figure was measured. Threads are those of this process; arms in others say theirs in their settings."""
    torch = sys.modules.get("torch")
    installed = {d.name.lower(): d.version for d in metadata.distributions() if d.name.lower() in PACKAGES}
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
        "threads": torch.get_num_threads() if torch else None,
        "versions": {"python": platform.python_version()} | installed,
    }


def _processor() -> str:
    """Its name and the instruction sets that decide what is fast: `Intel(R) Xeon(R) Processor avx2 avx512f`."""
    file = Path("/proc/cpuinfo")
    told = file.read_text() if file.exists() else ""
    name = re.search(r"^model name\s*: (.+)", told, re.MULTILINE)
    sets = [one for one in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {one} " in told]
    return " ".join([name[1] if name else platform.machine(), *sets])


def _target(text: str) -> tuple[str, float, bool]:
    found = _TARGET.fullmatch(text)
    if found is None:
        raise ValueError(f"target {text!r} is not like '>= 1.2x' or '<= 15'")
    return found[1], float(found[2]), bool(found[3])


def _check(target: str | None) -> None:
    """Before minutes are spent on measuring."""
    if target is not None:
        _target(target)
