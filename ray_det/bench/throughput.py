"""Images/s of training steps on ready batches, by model, batch size, eager and compiled, against a bare eager loop.

With each figure come the arithmetic of an image and the share that the steps reach of what the machine could do (MFU:
arXiv:2204.02311, appendix B), the memory, and on a GPU the share of time in which no kernel runs. Batches are square.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ray_det.bench.alone import seconds
from ray_det.bench.criterion import CLASSES, drawn
from ray_det.bench.measure import Arm, Bench, Figure, compare
from ray_det.bench.step import bare_step, build
from ray_det.bench.task import DFINE_SMALL
from ray_det.config import ModelConfig, OptimConfig
from ray_det.models.compute import use_bf16
from ray_det.models.parts import compile_networks
from ray_det.models.winograd import WinogradConv2d
from ray_det.train.step import train_step

MODELS = {
    "dfine": (ModelConfig(name="transformers/d_fine", weights="none", config=DFINE_SMALL), 640),
    "retinanet": (ModelConfig(name="torchvision/retinanet_resnet50_fpn", weights="none"), 800),
}
"""By name: the model and its usual side in pixels."""
PEAKS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "RTX 4090": 165,
}
"""Dense bfloat16 TFLOP/s by their makers' data sheets; the longest that a GPU's name has, in whole words, is its."""


class Config(Bench):
    models: tuple[Literal["dfine", "retinanet"], ...] = Field(
        default=("dfine", "retinanet"), description="D-FINE-S; RetinaNet on ResNet-50"
    )
    image_size: Annotated[int, Field(ge=32, multiple_of=32)] | None = Field(
        default=None, description="side, pixels; default: 640 for D-FINE-S, 800 for RetinaNet"
    )
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4, 16, 64), description="images per step")
    modes: tuple[Literal["eager", "compiled"], ...] = Field(
        default=("eager", "compiled"), description="of our step; the bare loop is eager"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="of both arms")
    steps: Annotated[int, Field(ge=1)] = Field(default=10, description="steps per repetition")
    threads: Annotated[int, Field(ge=1)] = Field(default_factory=torch.get_num_threads, description="torch threads")


def run(config: Config) -> Iterator[Figure]:
    torch.set_num_threads(config.threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    bf16 = use_bf16(config.precision, device)
    rate = matrix_rate(device, bf16)
    for name in config.models:
        for batch_size in config.batch_sizes:
            for mode in config.modes:
                try:
                    yield _figure(config, name, batch_size, mode, device, bf16=bf16, rate=rate)
                except torch.OutOfMemoryError:
                    print(f"{name}, batch {batch_size}, {mode}: out of memory", file=sys.stderr)


def _figure(
    config: Config, name: str, batch_size: int, mode: str, device: torch.device, *, bf16: bool, rate: float
) -> Figure:
    model, side = MODELS[name]
    side = config.image_size or side
    micro = drawn(side, batch_size)
    torch.compiler.reset()  # else the next shapes count as too many recompilations, and stay eager
    ours, optimizer = build(model, CLASSES, OptimConfig(), device)
    if mode == "compiled":
        compile_networks(ours, many_shapes=False)
    step = partial(train_step, ours, optimizer, [micro], device=device, clip_norm=0.1, seed=0, global_step=0, bf16=bf16)
    for _ in range(3):  # compilation, choice of kernels
        step()
    seen = _on_gpu(step, device)
    bare, bare_optimizer = build(model, CLASSES, OptimConfig(), device)
    plain = partial(bare_step, bare, bare_optimizer, micro, bf16=bf16)
    work = flops(plain, bare) / batch_size
    more = {"GFLOP per image": work / 1e9, "TFLOP/s of a matrix product": rate / 1e12} | seen

    def images_per_second(function: Callable[[], object]) -> float:
        return batch_size / seconds(lambda: [function() for _ in range(config.steps)], device, config.steps)

    settings = {"model": model.name, "side": side, "batch_size": batch_size, "steps": config.steps}
    settings |= {"precision": "bf16" if bf16 else "fp32"}
    figure = compare(
        f"{name}, {side} px, batch {batch_size}, {mode}",
        "images/s",
        Arm("ray_det", partial(images_per_second, step), settings | {"clip_norm": 0.1}),
        Arm("bare loop, eager", partial(images_per_second, plain), settings),
        repeats=config.repeats,
        more=more,
    )
    more["share of a matrix product's rate"] = figure.value * work / rate
    if bf16 and (peak := peak_of(device)):
        more["MFU"] = figure.value * work / peak
    return figure


def flops(step: Callable[[], object], network: nn.Module) -> int:
    """Of convolutions, matrix products and attention of an eager step, forward and backward: 2 per multiplication.

    Convolutions count as direct ones: what a faster algorithm saves is speed, and float32 on CPUs alone has it.
    """
    faster: list[nn.Module] = [module for module in network.modules() if type(module) is WinogradConv2d]
    for module in faster:
        module.__class__ = nn.Conv2d
    with FlopCounterMode(display=False) as counter:
        step()
    for module in faster:
        module.__class__ = WinogradConv2d
    return counter.get_total_flops()


def matrix_rate(device: torch.device, bf16: bool) -> float:
    """FLOP/s of a large product of two square matrices, the best of some."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    product = partial(torch.mm, a, a)
    product()
    return 2 * side**3 / min(seconds(product, device) for _ in range(10))


def peak_of(device: torch.device) -> float | None:
    """FLOP/s in bfloat16 by the maker; None: not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [gpu for gpu in PEAKS if re.search(rf"\b{gpu}\b", name)]
    return 1e12 * PEAKS[max(known, key=len)] if known else None


def _on_gpu(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Memory at its peak and the idle share of some steps; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as done:
        begin = time.perf_counter()
        for _ in range(5):
            step()
        torch.cuda.synchronize(device)
        wall = time.perf_counter() - begin
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in done.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    return {
        "GPU idle share": 1 - covered(kernels) / (wall * 1e6),
        "GPU memory, GiB": torch.cuda.max_memory_allocated(device) / 2**30,
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what intervals cover together."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
