"""Plan rows to ready micro-batches: a pure function.

Images lie top-left on a canvas filled with the mean of ImageNet (or black); heights and widths of the canvas come from
the plan. What a micro-batch holds depends on its plan row, the manifest and the seed, never on who loads it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow.compute as pc

from ray_det import boxes as box_ops
from ray_det.config import AugmentConfig
from ray_det.data import augment, decode, paths
from ray_det.data.manifest import PLACE, Manifest, Place
from ray_det.data.plan import Assignment, resized
from ray_det.retry import PATIENCE_S
from ray_det.types import DEFAULT_LIMITS, IMAGENET_MEAN, ImageLimits, MicroBatch, UserError

MEAN_PIXEL = np.round(255 * np.array(IMAGENET_MEAN)).astype(np.uint8)
LOADED = ("image_id", "uri", "height", "width", "boxes", "labels", "box_ok", *PLACE)
"""Columns of the manifest that loaders need."""
THREADS = 2
"""Images loaded at once by one loader: decoding releases the GIL, and one may wait for the disk."""


@dataclass(frozen=True)
class LoadSpec:
    """How images become micro-batches, the same for all of a run."""

    resize: str
    padding: str
    seed: int
    augment: AugmentConfig | None  # None: evaluation
    limits: ImageLimits = DEFAULT_LIMITS
    skip_bad: bool = False  # an image that cannot be loaded becomes a blank one
    patience_s: float = PATIENCE_S  # for which a storage may be out of reach
    scaled_decode: bool = False  # JPEGs may be decoded smaller than they are stored


@dataclass(frozen=True)
class Shard:
    """Micro-batches to load of a manifest's images."""

    manifest: Manifest
    assignment: Assignment
    spec: LoadSpec


class _Image(NamedTuple):
    """What is loaded of a manifest row."""

    id: int
    size: tuple[int, int]  # (h, w) as stored
    place: Place
    boxes_N4: np.ndarray  # float64 xyxy in pixels of the stored image: those that may be trained on
    labels_N: np.ndarray  # int64


def load(work: Shard, start: int = 0, stop: int | None = None) -> list[MicroBatch]:
    """Load micro-batches start..stop - 1 of a shard; all pixels lie in one buffer.

    Raises:
        UserError: an image leaves the root, or, unless `spec.skip_bad`, cannot be read or is not of the size that the
            manifest has.
    """
    cv2.setNumThreads(0)  # the pool below is the parallelism
    part = work.assignment.slice(start, len(work.assignment) if stop is None else stop)
    images = _images(work.manifest, part.rows)
    areas = np.diff(part.offsets) * part.canvas.prod(axis=1, dtype=np.int64) * 3
    ends = np.cumsum(areas)
    buffer = np.empty(int(ends[-1]), np.uint8)
    with ThreadPoolExecutor(THREADS) as pool:
        return [
            _load_one(work.spec, part, i, images, buffer[end - size : end], pool)
            for i, (end, size) in enumerate(zip(ends, areas, strict=True))
        ]


def _images(manifest: Manifest, rows: np.ndarray) -> list[_Image]:
    """The images at these rows.

    Raises:
        UserError: a symbolic link leads out of the root.
    """
    table = manifest.table.select(LOADED).take(rows)
    columns = {name: table[name].combine_chunks() for name in LOADED}
    lengths = pc.call_function("list_value_length", [columns["box_ok"]]).to_numpy()
    usable = columns["box_ok"].flatten().to_numpy(zero_copy_only=False)
    boxes = box_ops.xywh_to_xyxy(columns["boxes"].flatten().flatten().to_numpy().reshape(-1, 4)[usable])
    labels = columns["labels"].flatten().to_numpy()[usable].astype(np.int64)
    kept = np.concatenate([[0], np.cumsum(usable)])  # of the first i boxes
    cuts = kept[np.cumsum(lengths)]
    places = manifest.places(columns)
    for place in places:
        if place.shard is None and paths.is_outside(place.uri, manifest.root):
            raise UserError(f"{place.uri} is refused: it is a symbolic link that leaves {manifest.root}")
    sizes = zip(columns["height"].to_pylist(), columns["width"].to_pylist(), strict=True)
    boxes_of, labels_of = np.split(boxes, cuts[:-1]), np.split(labels, cuts[:-1])
    ids = columns["image_id"].to_pylist()
    return [_Image(*values) for values in zip(ids, sizes, places, boxes_of, labels_of, strict=True)]


def _load_one(
    spec: LoadSpec, part: Assignment, i: int, images: list[_Image], buffer: np.ndarray, pool: ThreadPoolExecutor
) -> MicroBatch:
    images = images[part.offsets[i] : part.offsets[i + 1]]
    epoch, step, index = map(int, part.keys[i])
    height, width = map(int, part.canvas[i])
    pixels = buffer.reshape(len(images), height, width, 3)
    size = int(part.image_size[i])
    loaded = pool.map(lambda pair: _load_image(spec, pair[0], epoch, size, pair[1]), zip(images, pixels, strict=True))
    sizes, boxes, labels, skipped = zip(*loaded, strict=True)
    return MicroBatch(
        epoch,
        step,
        index,
        pixels,
        np.array(sizes, np.int32),
        np.array([image.size for image in images], np.int32),
        np.array([image.id for image in images], np.int64),
        list(boxes),
        list(labels),
        skipped if any(skipped) else (),
    )


def _load_image(
    spec: LoadSpec, image: _Image, epoch: int, image_size: int, canvas_HW3: np.ndarray
) -> tuple[tuple[int, int], np.ndarray, np.ndarray, str]:
    """Decode one image onto its canvas -> (h, w) of its real pixels, boxes (N, 4), labels (N,), why it was skipped."""
    fit = resized(np.array(image.size[0]), np.array(image.size[1]), image_size, spec.resize)
    canvas, config = (canvas_HW3.shape[0], canvas_HW3.shape[1]), spec.augment
    view = whole = augment.whole(image.size, (int(fit[0]), int(fit[1])))
    if config is not None:
        rng = np.random.default_rng([spec.seed, epoch, image.id % 2**63])
        view = augment.sample(rng, config, image.size, (view.height, view.width), canvas)
    if view.height > canvas[0] or view.width > canvas[1]:
        raise AssertionError(f"{image.place.name}: {view} does not fit the planned canvas {canvas}")
    shrink = augment.shrink_of(view) if spec.scaled_decode else 1
    view = augment.aligned(view, image.size, shrink)
    try:
        pixels = _decode(image, spec, shrink)
    except UserError as error:
        if not spec.skip_bad:
            raise
        # Its place in the plan is kept: nobody else's images, canvas or random numbers change.
        canvas_HW3[:] = _fill(spec.padding)
        return (whole.height, whole.width), np.empty((0, 4), np.float32), np.empty(0, np.int64), str(error)
    _place(view, pixels, spec.padding, canvas_HW3, shrink if pixels.shape[:2] != image.size else 1)
    boxes = box_ops.clip(image.boxes_N4, *image.size)
    boxes, keep = augment.apply_to_boxes(view, boxes, config.min_visible if config else 0.0)
    return (view.height, view.width), boxes, image.labels_N[keep], ""


def _decode(image: _Image, spec: LoadSpec, shrink: int) -> np.ndarray:
    """All pixels of the image, or of a JPEG a part, as `shrink` says."""
    name = image.place.name
    try:
        data = image.place.read(spec.limits.bytes, spec.patience_s)
        pixels, size = decode.decode_for(data, name, lambda size: shrink, spec.limits)
        if size != image.size:
            raise UserError(f"{name} is {size} (h, w), the manifest says {image.size}: prepare it again")
    except UserError as error:
        raise UserError(f"image {image.id}: {error}") from error
    return pixels


def _place(view: augment.View, image_HW3: np.ndarray, padding: str, canvas_HW3: np.ndarray, shrink: int = 1) -> None:
    """The view of an image, which is shrunk already, top-left on the canvas, the rest filled."""
    augment.apply(view, image_HW3, canvas_HW3[: view.height, : view.width], shrink)
    fill = _fill(padding)
    canvas_HW3[view.height :] = fill
    canvas_HW3[: view.height, view.width :] = fill


def _fill(padding: str) -> np.ndarray:
    """(3,) what padded pixels hold."""
    return MEAN_PIXEL if padding == "mean" else np.zeros(3, np.uint8)


def pad_to_canvas(
    image_HW3: np.ndarray, size: tuple[int, int], fit: tuple[int, int], padding: str, canvas_HW3: np.ndarray
) -> None:
    """What `load` does in evaluation, for an image of (h, w) `size` that is decoded already, perhaps smaller.

    It is resized to (h, w) `fit`, placed, and the rest is filled.
    """
    view = augment.whole(size, fit)
    _place(view, image_HW3, padding, canvas_HW3, augment.shrink_of(view) if image_HW3.shape[:2] != size else 1)
