"""The plan of an epoch: padded pixels, what they cost in training, seconds and memory for many images."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from ray_det.bench import photos
from ray_det.bench.measure import Arm, Bench, Figure, compare, single
from ray_det.config import AugmentConfig, DatasetConfig, ModelConfig, OptimConfig
from ray_det.data import augment
from ray_det.data.plan import EpochPlan, plan_epoch, resized
from ray_det.models.build import build_detector
from ray_det.models.detector import Detector, to_device
from ray_det.train.optim import build_optimizer
from ray_det.types import ClassList, MicroBatch

IMAGES = 8192
TRAINED = 128
"""Images of a repetition of training steps."""


class Config(Bench):
    image_size: Annotated[int, Field(ge=32)] = Field(default=640, description="side that images are resized to, pixels")
    train_image_size: Annotated[int, Field(ge=32)] = Field(default=320, description="the same for the training steps")
    sizes: tuple[int, ...] = Field(default=(10**4, 10**5, 10**6, 10**7), description="images that are planned")
    parts: tuple[Literal["padding", "train", "time"], ...] = Field(
        default=("padding", "train", "time"), description="which figures"
    )


def run(config: Config) -> Iterator[Figure]:
    sizes = photos.coco_sizes(IMAGES, seed=0)
    if "padding" in config.parts:
        for batch in (4, 16):
            for ranks in (1, 8):
                yield _padding(config, sizes, batch, ranks)
    if "train" in config.parts:
        for batch in (4, 16):
            yield _training(config, sizes, batch)
    if "time" in config.parts:
        yield from _times(config)


def plan_of(sizes_N2: np.ndarray, data: DatasetConfig, batch: int, ranks: int, epoch: int) -> EpochPlan:
    shape: dict[str, Any] = {"micro_batches": ranks, "micro_batch_size": batch, "divisor": 32, "seed": 0}
    heights, widths = sizes_N2[:, 0], sizes_N2[:, 1]
    return plan_epoch(heights, widths, np.arange(len(sizes_N2)), data, **shape, epoch=epoch)


def _padding(config: Config, sizes_N2: np.ndarray, batch: int, ranks: int) -> Figure:
    """Pixels of canvases that hold no picture, with the augmentation that training draws."""
    epochs = count()

    def share(window: int) -> float:
        data = DatasetConfig(image_size=config.image_size, window=window)
        epoch = next(epochs)
        plan = plan_of(sizes_N2, data, batch, ranks, epoch)
        drawn = AugmentConfig(brightness=0, contrast=0, saturation=0)
        real = 0
        for rows, canvas in zip(plan.rows_SMB.reshape(plan.steps, -1), plan.canvas_S2.tolist(), strict=True):
            heights, widths = sizes_N2[rows, 0], sizes_N2[rows, 1]
            fits = resized(heights, widths, data.image_size, data.resize).tolist()
            for row, h, w, fit in zip(rows.tolist(), heights.tolist(), widths.tolist(), fits, strict=True):
                rng = np.random.default_rng([epoch, row])
                view = augment.sample(rng, drawn, (h, w), (fit[0], fit[1]), (canvas[0], canvas[1]))
                real += view.height * view.width
        return 100 * (1 - real / (plan.canvas_S2.prod(axis=1, dtype=np.int64).sum() * batch * ranks))

    ours, peer = (Arm(name, partial(share, w), {"window": w}) for name, w in (("planned", 16), ("random batches", 1)))
    where = f"{config.image_size} px, batch {batch}, {ranks} rank{'s' if ranks > 1 else ''}"
    return compare(f"padded share, {where}", "% of pixels", ours, peer, repeats=config.repeats, target="<= 6")


def _training(config: Config, sizes_N2: np.ndarray, batch: int) -> Figure:
    """Steps of a small FCOS over batches whose shapes stand for an epoch's."""
    model = ModelConfig(name="torchvision/fcos_mobilenet_v3_small_fpn", weights="none", fpn_channels=32)
    detector = build_detector(model, ClassList(("thing",), (1,)))[0].train()
    optimizer = build_optimizer(OptimConfig(), detector)

    def rate(window: int) -> float:
        data = DatasetConfig(image_size=config.train_image_size, window=window)
        plan = plan_of(sizes_N2, data, batch, 1, 0)
        canvases = spread(plan.canvas_S2, TRAINED // batch).tolist()
        start = time.perf_counter()
        for canvas in canvases:
            _step(detector, optimizer, batch, canvas)
        return len(canvases) * batch / (time.perf_counter() - start)

    ours, peer = (Arm(name, partial(rate, w), {"window": w}) for name, w in (("planned", 16), ("random batches", 1)))
    where = f"{config.train_image_size} px, batch {batch}, FCOS"
    more = {"threads": torch.get_num_threads()}
    return compare(f"training, {where}", "images/s", ours, peer, repeats=config.repeats, target=">= 1.2x", more=more)


def spread(canvas_S2: np.ndarray, count: int) -> np.ndarray:
    """Some canvases of an epoch in its order: from the smallest to the largest, each stands for as many."""
    by_area_S = canvas_S2.prod(axis=1, dtype=np.int64).argsort(kind="stable")
    middles = ((np.arange(count) + 0.5) / count * len(canvas_S2)).astype(int)
    return canvas_S2[np.sort(by_area_S[middles])]


def _step(detector: Detector, optimizer: torch.optim.Optimizer, batch: int, canvas: list[int]) -> None:
    size, box = np.array([canvas] * batch, np.int32), np.array([[10, 10, 60, 60]], np.float32)
    pixels = np.full((batch, *canvas, 3), 100, np.uint8)
    ids, label = np.arange(batch), np.zeros(1, np.int64)
    micro = MicroBatch(0, 0, 0, pixels, size, size, ids, [box] * batch, [label] * batch)
    optimizer.zero_grad()
    detector.loss(to_device(micro, torch.device("cpu")))["loss"].backward()
    optimizer.step()


PLAN = """
import json, resource, sys, time
from ray_det.bench.plan import DatasetConfig, photos, plan_of
sizes = photos.coco_sizes(int(sys.argv[1]), seed=0)
start = time.perf_counter()
part = plan_of(sizes, DatasetConfig(), 16, 1, 0).assign(0, 1)
print(json.dumps([time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
"""


def _times(config: Config) -> Iterator[Figure]:
    """Each in a process of its own, whose peak of memory has the interpreter and the sizes in it."""
    seconds: list[float] = []
    for images in config.sizes:
        seen: list[float] = []

        def plan(images: int = images, seen: list[float] = seen) -> float:
            command = [sys.executable, "-c", PLAN, str(images)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            seen.append(found[1])
            return found[0]

        arm = Arm("plan_epoch and assign", plan, {"batch": 16})
        figure = single(f"plan of {images:,} images", "s", arm, repeats=config.repeats, target="<= 30")
        seconds.append(figure.value)
        yield figure
        peak = Arm("peak of the process", iter(seen).__next__)
        yield single(f"memory, {images:,} images", "GiB", peak, repeats=config.repeats, target="<= 2")
    if len(seconds) > 1:
        slope = float(np.polyfit(np.log(config.sizes), np.log(seconds), 1)[0])
        fit = Arm("slope of log(s) over log(images)", lambda: slope)
        yield single("growth of the plan's time", "power", fit, repeats=1, warm_up=False)
