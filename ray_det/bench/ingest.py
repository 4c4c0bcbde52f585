"""From files to batches in the process that trains: images/s, the first batch, decoding."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cv2
import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from ray_det.bench import photos
from ray_det.bench.measure import Arm, Bench, Figure, compare, single
from ray_det.cluster import start_ray
from ray_det.config import AugmentConfig, DatasetConfig, WorkersConfig
from ray_det.data import files
from ray_det.data.collate import Shard, load
from ray_det.data.decode import decode
from ray_det.data.image import MEAN_PIXEL, LoadSpec
from ray_det.data.manifest import Manifest
from ray_det.data.plan import plan_epoch, resized, round_up
from ray_det.data.prepare import prepare
from ray_det.train.start import cache_folder
from ray_det.types import UserError

if TYPE_CHECKING:
    from ray_det.data.pipeline import Loaders

LOADERS = 2
FEWEST_BATCHES = 32
"""Of an epoch whose rate is measured: with less, it depends on where in a task's eight batches the epoch ends."""


class Config(Bench):
    data: str | None = Field(default=None, description="COCO JSON; default: drawn pictures of COCO's sizes")
    images: str | None = Field(default=None, description="root of its `file_name`")
    image_sizes: tuple[int, ...] = Field(default=(640, 192), description="sides that images are resized to, pixels")
    batches: tuple[int, ...] = Field(default=(4, 16), description="images per batch")
    epoch_images: Annotated[int, Field(ge=64)] = Field(default=1024, description="images per repetition")
    parts: tuple[Literal["stream", "first", "decode"], ...] = Field(
        default=("stream", "first", "decode"), description="which figures"
    )


def run(config: Config) -> Iterator[Figure]:
    if "stream" in config.parts and config.epoch_images < (least := FEWEST_BATCHES * max(config.batches)):
        raise UserError(
            f"--epoch_images {config.epoch_images}: expected >= {least}, {FEWEST_BATCHES} batches of the largest size"
        )
    cache = cache_folder("./runs") / "bench"
    source = config.data or str(photos.draw(cache / "photos", photos.coco_sizes(256, seed=0)))
    manifest, _ = prepare(source, config.images, cache / "manifests")
    if "decode" in config.parts:
        yield _decoding(config, manifest)
        large = np.array([(960, 1280), (1280, 960)] * 12)
        yield _scaled(config, prepare(str(photos.draw(cache / "large", large)), None, cache / "manifests")[0])
    if "first" in config.parts:
        yield _first_after_start(config, source)
    if "stream" in config.parts:
        yield from _streams(config, manifest)


def work_of(manifest: Manifest, config: Config, size: int, batch: int, epoch: int = 0) -> Shard:
    """An epoch of `epoch_images` of a manifest's images, over and over."""
    rows = np.resize(np.flatnonzero(manifest.table["trainable"].to_numpy()), config.epoch_images)
    heights, widths = (manifest.table[name].to_numpy()[rows] for name in ("height", "width"))
    shape: dict[str, Any] = {"micro_batches": 1, "micro_batch_size": batch, "divisor": 32, "seed": 0, "epoch": epoch}
    plan = plan_epoch(heights, widths, rows, DatasetConfig(image_size=size), **shape)
    return Shard(manifest, plan.assign(0, 1), LoadSpec("longest", "mean", 0, AugmentConfig()))


def _streams(config: Config, manifest: Manifest) -> Iterator[Figure]:
    from ray_det.data.pipeline import Loaders

    start_ray(WorkersConfig())
    loaders = Loaders(LOADERS)
    settings = {"loaders": LOADERS}
    tuned = {"num_workers": LOADERS, "persistent_workers": True, "prefetch_factor": 4, "multiprocessing": "forkserver"}
    for size in config.image_sizes:
        for batch in config.batches:
            work = work_of(manifest, config, size, batch)
            ours = Arm("Loaders", partial(_rate, lambda w=work: loaders.stream(w)), settings)
            first = Arm("Loaders", _turnover(loaders, work), settings)
            where = f"{size} px, batch {batch}"
            same = _torch_loader(_Planned(work), batch_size=None)
            peer = Arm("DataLoader, the same transforms", partial(_rate, lambda x=same: x), tuned)
            yield compare(f"ingest, {where}", "images/s", ours, peer, repeats=config.repeats, target=">= 1.2x")
            plain = _torch_loader(_Plain(manifest, work, size), batch_size=batch, shuffle=True, collate_fn=_pad)
            peer = Arm("DataLoader, torchvision's transforms", partial(_rate, lambda x=plain: x), tuned)
            yield compare(f"ingest, {where}", "images/s", ours, peer, repeats=config.repeats, target=">= 1.2x")
            yield single(f"first batch of an epoch, {where}", "s", first, repeats=config.repeats, target="<= 0.3")


def _rate(open_epoch: Callable[[], Iterable[Any]]) -> float:
    """Images per second after the first quarter of an epoch."""
    arrivals: list[float] = []
    images: list[int] = []
    for batch in open_epoch():
        pixels = batch.pixels_BHW3 if hasattr(batch, "pixels_BHW3") else batch[0]
        arrivals.append(time.perf_counter())
        images.append(len(pixels))
    start = len(arrivals) // 4
    return steady_rate(np.array(arrivals[start:]), np.array(images[start:]))


def steady_rate(arrivals_B: np.ndarray, images_B: np.ndarray) -> float:
    """Images per second of batches that came one by one or several at once: the slope of the line through the images
    until then over seconds. From one arrival to another is no measure: what came together was made before.
    """
    return float(np.polyfit(arrivals_B - arrivals_B[0], np.cumsum(images_B), 1)[0])


def _turnover(loaders: Loaders, work: Shard) -> Callable[[], float]:
    """Seconds from the last batch of an epoch, as if its step took no time, to the first of the next."""
    batches = loaders.stream(work)

    def once() -> float:
        nonlocal batches
        for _ in batches:
            pass
        start = time.perf_counter()
        loaders.expect([work])  # as the training loop does ahead of an epoch's last step
        batches = loaders.stream(work)
        next(batches)
        return time.perf_counter() - start

    return once


FIRST = """
import sys, time
from ray_det.bench.ingest import LOADERS, Config, prepare, work_of, cache_folder, start_ray, WorkersConfig
from ray_det.data.pipeline import Loaders
config = Config.model_validate_json(sys.argv[1])
manifest, _ = prepare(sys.argv[2], config.images, cache_folder("./runs") / "bench" / "manifests")
start_ray(WorkersConfig())
work = work_of(manifest, config, config.image_sizes[0], config.batches[0])
time.sleep(2)  # what a start leaves running ends
start = time.perf_counter()
next(Loaders(LOADERS).stream(work))
print(time.perf_counter() - start)
"""


def _first_after_start(config: Config, source: str) -> Figure:
    def once() -> float:
        command = [sys.executable, "-W", "ignore", "-c", FIRST, config.model_dump_json(), source]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    arm = Arm("Loaders, processes not warmed up", once, {"loaders": LOADERS})
    return single("first batch after a start", "s", arm, repeats=config.repeats, target="<= 1.5")


def _torch_loader(dataset: Dataset, **options: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=LOADERS,
        persistent_workers=True,
        prefetch_factor=4,
        multiprocessing_context="forkserver",  # a fork of a process with Ray in it may hang
        **options,
    )


class _Planned(Dataset):
    """Our own loading: what differs is the way from process to process."""

    def __init__(self, work: Shard) -> None:
        self.work = work

    def __len__(self) -> int:
        return len(self.work.assignment)

    def __getitem__(self, i: int) -> tuple:
        (batch,) = load(self.work, i, i + 1)
        boxes, labels = (list(map(torch.from_numpy, part)) for part in (batch.boxes_N4, batch.labels_N))
        return torch.from_numpy(batch.pixels_BHW3), boxes, labels, torch.from_numpy(batch.sizes_B2)


class _Plain(Dataset):
    """What a good PyTorch loop does: libjpeg-turbo, torchvision's transforms, one image at a time."""

    def __init__(self, manifest: Manifest, work: Shard, size: int) -> None:
        rows = work.assignment.rows
        self.uris = [manifest.uri(int(row)) for row in rows]
        # Not tensors: each would take a file descriptor on its way to a worker.
        self.boxes = [np.array(manifest.table["boxes"][int(row)].as_py()).reshape(-1, 4) for row in rows]
        self.size = size

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.set_num_threads(1)
        with files.open_binary(self.uris[i]) as content, Image.open(io.BytesIO(content.read())) as file:
            image = functional.pil_to_tensor(file.convert("RGB"))
        boxes, config = torch.tensor(self.boxes[i], dtype=torch.float32), AugmentConfig()
        draw = torch.rand(5)
        scale = min(config.scale[0] + float(draw[0]) * (config.scale[1] - config.scale[0]), 1.0)  # crops cost nothing
        height, width = resized(np.array(image.shape[1]), np.array(image.shape[2]), int(self.size * scale), "longest")
        boxes *= float(width) / image.shape[2]
        image = functional.resize(image, [int(height), int(width)], antialias=True)
        for change, u in zip(
            (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation),
            draw[2:].tolist(),
            strict=True,
        ):
            image = change(image, 0.8 + 0.4 * u)
        if draw[1] < config.flip:
            image = functional.horizontal_flip(image)
            boxes[:, 0] = image.shape[2] - boxes[:, 0] - boxes[:, 2]
        return image, boxes


def _pad(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Each batch to its own largest, filled with the mean."""
    height, width = (int(round_up(np.array(max(i.shape[d] for i, _ in samples)), 32)) for d in (1, 2))
    mean = torch.from_numpy(MEAN_PIXEL)[None, :, None, None]
    pixels = mean.repeat(len(samples), 1, height, width)
    for canvas, (image, _) in zip(pixels, samples, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return pixels, [boxes for _, boxes in samples]


def _decoding(config: Config, manifest: Manifest) -> Figure:
    rows = np.flatnonzero(manifest.table["readable"].to_numpy())[:64]
    contents = [manifest.place(int(row)).read() for row in rows]

    def rate(function: Callable[[bytes], Any]) -> float:
        start = time.thread_time()
        for data in contents:
            function(data)
        return len(contents) / (time.thread_time() - start)

    ours = Arm("decode", partial(rate, lambda data: decode(data, "")), {"by": "simplejpeg", "files": len(contents)})
    peer = Arm("Pillow", partial(rate, lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))))
    return compare("decode", "images/s of one core", ours, peer, repeats=config.repeats, target=">= 1.5x")


def _scaled(config: Config, manifest: Manifest) -> Figure:
    """Loading of photographs of 1280 x 960 at 320 px, augmented."""
    work = work_of(manifest, config.model_copy(update={"epoch_images": 64}), 320, 4)

    def rate(scaled: bool) -> float:
        cv2.setNumThreads(0)
        start = time.process_time()
        load(replace(work, spec=replace(work.spec, scaled_decode=scaled)))
        return len(work.assignment.rows) / (time.process_time() - start)

    ours, peer = (Arm(f"scaled_decode {on}", partial(rate, on)) for on in (True, False))
    return compare("load 1280 x 960 at 320 px", "images/s of one core", ours, peer, repeats=config.repeats)
