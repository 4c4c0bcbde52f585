"""An image of the manifest as loaders know it: what its row says, and its pixels drawn into a window of a canvas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_det import boxes as box_ops
from ray_det.config import AugmentConfig
from ray_det.data import augment, decode, paths
from ray_det.data.manifest import PLACE, Manifest, Place
from ray_det.data.plan import resized
from ray_det.retry import PATIENCE_S
from ray_det.types import DEFAULT_LIMITS, IMAGENET_MEAN, ImageLimits, UserError

MEAN_PIXEL = np.round(255 * np.array(IMAGENET_MEAN)).astype(np.uint8)
LOADED = ("image_id", "uri", "height", "width", "boxes", "labels", "box_ok", *PLACE)
"""Columns of the manifest that loaders need."""
Size = tuple[int, int]
"""(h, w), pixels"""


@dataclass(frozen=True)
class LoadSpec:
    """How images become micro-batches, the same for all of an epoch."""

    resize: str
    padding: str
    seed: int
    augment: AugmentConfig | None  # None: evaluation
    limits: ImageLimits = DEFAULT_LIMITS
    skip_bad: bool = False  # an image that cannot be loaded becomes a blank one
    patience_s: float = PATIENCE_S  # for which a storage may be out of reach
    scaled_decode: bool = False  # JPEGs may be decoded smaller than they are stored


class Source(NamedTuple):
    """What is loaded of a manifest row."""

    id: int
    size: Size  # as stored
    place: Place
    boxes_N4: np.ndarray  # float64 xyxy in pixels of the stored image: those that may be trained on
    labels_N: np.ndarray  # int64
    content: bytes | UserError | None = None  # the file, or why it cannot be read; None: not read yet

    def fetched(self, spec: LoadSpec) -> Source:
        """With its content.

        Raises:
            StorageError: a remote storage stayed out of reach.
        """
        try:
            return self._replace(content=self.place.read(spec.limits.bytes, spec.patience_s))
        except UserError as error:
            return self._replace(content=error)


def sources(manifest: Manifest, rows: np.ndarray) -> list[Source]:
    """The images at these rows.

    Raises:
        UserError: a symbolic link leads out of the root.
    """
    table = manifest.table.select(LOADED).take(rows)
    columns: dict[str, pa.Array] = {name: table[name].combine_chunks() for name in LOADED}
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
    boxes_of, labels_of = np.split(boxes, cuts)[:-1], np.split(labels, cuts)[:-1]  # no rows: no parts
    ids = columns["image_id"].to_pylist()
    return [Source(*values) for values in zip(ids, sizes, places, boxes_of, labels_of, strict=True)]


def fit(spec: LoadSpec, size: Size, image_size: int) -> Size:
    """What an image of this size is resized to, before any augmentation."""
    height, width = resized(np.array(size[0]), np.array(size[1]), image_size, spec.resize).tolist()
    return height, width


def draw_view(
    spec: LoadSpec, source: Source, view: augment.View, window_HW3: np.ndarray, min_side: float
) -> tuple[np.ndarray, np.ndarray, str]:
    """Decode an image, and draw a view of it into a window of the same size.

    Returns:
        Boxes (N, 4) in the window and labels (N,), but for those that it hardly shows; and why there is nothing, where
        an image cannot be loaded and `spec.skip_bad`. The window is left alone then.

    Raises:
        UserError: as `collate.load`.
    """
    if window_HW3.shape[:2] != (view.height, view.width):
        raise AssertionError(f"{source.place.name}: {view} does not fit the planned canvas")
    shrink = augment.shrink_of(view) if spec.scaled_decode else 1
    view = augment.aligned(view, source.size, shrink)
    try:
        pixels = _decode(source, spec, shrink)
    except UserError as error:
        if not spec.skip_bad:
            raise
        return np.empty((0, 4), np.float32), np.empty(0, np.int64), str(error)
    augment.apply(view, pixels, window_HW3, shrink if pixels.shape[:2] != source.size else 1)
    boxes = box_ops.clip(source.boxes_N4, *source.size)
    boxes, keep = augment.apply_to_boxes(view, boxes, spec.augment.min_visible if spec.augment else 0.0, min_side)
    return boxes, source.labels_N[keep], ""


def _decode(source: Source, spec: LoadSpec, shrink: int) -> np.ndarray:
    """All pixels of the image, or of a JPEG a part, as `shrink` says."""
    name = source.place.name
    try:
        if source.content is None:
            raise AssertionError(f"{name} was not fetched")
        if isinstance(source.content, UserError):
            raise source.content
        pixels, size = decode.decode_for(source.content, name, lambda size: shrink, spec.limits)
        if size != source.size:
            raise UserError(f"{name} is {size} (h, w), the manifest says {source.size}: prepare it again")
    except UserError as error:
        raise UserError(f"image {source.id}: {error}") from error
    return pixels


def pad(canvas_HW3: np.ndarray, height: int, width: int, padding: str) -> None:
    """Fill what is beyond the real pixels."""
    canvas_HW3[height:] = fill(padding)
    canvas_HW3[:height, width:] = fill(padding)


def fill(padding: str) -> np.ndarray:
    """(3,) what padded pixels hold."""
    return MEAN_PIXEL if padding == "mean" else np.zeros(3, np.uint8)
