"""Plan rows to ready micro-batches: a pure function, with the Arrow form in which they travel between processes.

Images lie top-left on a canvas filled with the mean of ImageNet (or black); heights and widths of the canvas come from
the plan. What a micro-batch holds depends on its plan row, the manifest and the seed, never on who loads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise

import cv2
import numpy as np
import pyarrow as pa

from ray_det.ahead import ahead
from ray_det.data import augment
from ray_det.data.files import READS_AT_ONCE
from ray_det.data.image import LoadSpec, pad
from ray_det.data.manifest import Manifest
from ray_det.data.picture import Picture, Wanted, draw, wanted
from ray_det.data.plan import Assignment
from ray_det.types import MicroBatch

DRAWN_AT_ONCE = 2
"""Pictures that one loader draws at once, of those whose files are read: most of it releases the GIL."""
READ_AHEAD_BYTES = 64 << 20
"""Of files that wait to be drawn, unless so few pictures' are more: about as much as a block of pixels."""


@dataclass(frozen=True)
class Shard:
    """Micro-batches to load of a manifest's images."""

    manifest: Manifest
    assignment: Assignment
    spec: LoadSpec


def load(work: Shard, start: int = 0, stop: int | None = None) -> list[MicroBatch]:
    """Load micro-batches start..stop - 1 of a shard; all pixels lie in one buffer.

    Raises:
        UserError: an image leaves the root, or, unless `spec.skip_bad`, cannot be read or is not of the size that the
            manifest has.
    """
    cv2.setNumThreads(0)  # pictures are drawn side by side
    part = work.assignment.slice(start, len(work.assignment) if stop is None else stop)
    pictures = wanted(work.manifest, part, work.spec)
    canvases = _canvases(part)
    drawn = _draw_all(work.spec, pictures, np.repeat(part.image_size, np.diff(part.offsets)).tolist(), canvases)
    return [
        _micro_batch(part.keys[i], canvases[i], pictures[start:stop], drawn[start:stop])
        for i, (start, stop) in enumerate(pairwise(part.offsets.tolist()))
    ]


def _canvases(part: Assignment) -> list[np.ndarray]:
    """(B, H, W, 3) of each micro-batch, all in one buffer and without content."""
    images = np.diff(part.offsets)
    shapes = np.column_stack([images, part.canvas, np.full_like(images, 3)]).astype(np.int64)
    ends = np.cumsum(shapes.prod(axis=1))
    pixels = np.split(np.empty(int(ends[-1]), np.uint8), ends[:-1])
    return [flat.reshape(shape) for flat, shape in zip(pixels, shapes.tolist(), strict=True)]


def _draw_all(
    spec: LoadSpec, pictures: list[Wanted], image_sizes: list[int], canvases: list[np.ndarray]
) -> list[Picture]:
    """Files are read far ahead, because a storage may be far away; few are drawn at once, which takes the cores."""
    with ThreadPoolExecutor(READS_AT_ONCE) as readers, ThreadPoolExecutor(DRAWN_AT_ONCE) as artists:
        fetched = ahead(readers, lambda one: one.fetched(spec), pictures, _read_ahead(pictures))
        work = zip(fetched, image_sizes, chain.from_iterable(canvases), strict=True)
        return list(ahead(artists, lambda one: draw(spec, *one), work, 2 * DRAWN_AT_ONCE))


def _read_ahead(pictures: list[Wanted]) -> int:
    """Of how many pictures the files may be in memory: of fewer where files are large."""
    largest = max((one.file_bytes for one in pictures), default=0)
    return max(DRAWN_AT_ONCE, min(2 * READS_AT_ONCE, READ_AHEAD_BYTES // max(largest, 1)))


def _micro_batch(key: np.ndarray, pixels_BHW3: np.ndarray, pictures: list[Wanted], drawn: list[Picture]) -> MicroBatch:
    epoch, step, index = key.tolist()
    skipped = tuple(picture.skipped for picture in drawn)
    return MicroBatch(
        epoch,
        step,
        index,
        pixels_BHW3,
        np.array([picture.size for picture in drawn], np.int32),
        np.array([one.source.size for one in pictures], np.int32),
        np.array([one.source.id for one in pictures], np.int64),
        [picture.boxes_N4 for picture in drawn],
        [picture.labels_N for picture in drawn],
        skipped if any(skipped) else (),
        tuple(lost for picture in drawn for lost in picture.skipped_partners),
    )


def pad_to_canvas(
    image_HW3: np.ndarray, size: tuple[int, int], fit: tuple[int, int], padding: str, canvas_HW3: np.ndarray
) -> None:
    """What `load` does in evaluation, for an image of (h, w) `size` that is decoded already, perhaps smaller.

    It is resized to (h, w) `fit`, placed, and the rest is filled.
    """
    view = augment.whole(size, fit)
    shrink = augment.shrink_of(view) if image_HW3.shape[:2] != size else 1
    augment.apply(view, image_HW3, canvas_HW3[: view.height, : view.width], shrink)
    pad(canvas_HW3, view.height, view.width, padding)


_ARRAYS = {"sizes": np.int32, "orig_sizes": np.int32, "image_ids": np.int64, "boxes": np.float32, "labels": np.int64}
_PARTNERS = pa.list_(pa.struct({"image_id": pa.int64(), "why": pa.string()}))


def to_table(batches: list[MicroBatch]) -> pa.Table:
    """One Arrow row per micro-batch. Pixels that lie in one buffer, as `load` leaves them, are not copied."""
    head = np.array([(b.epoch, b.step, b.index, *b.pixels_BHW3.shape[:3]) for b in batches], np.int32)
    names = ("epoch", "step", "index", "images", "height", "width")
    columns: dict[str, pa.Array] = {name: pa.array(head[:, i]) for i, name in enumerate(names)}
    offsets = np.cumsum([0, *(b.pixels_BHW3.size for b in batches)], dtype=np.int64)
    flat = batches[0].pixels_BHW3.base
    if flat is None or flat.size != offsets[-1]:
        flat = np.concatenate([b.pixels_BHW3.ravel() for b in batches])
    columns["pixels"] = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(batches), [None, pa.py_buffer(offsets), pa.py_buffer(flat.reshape(-1))]
    )
    parts = {
        "counts": [np.array([len(n) for n in b.labels_N], np.int32) for b in batches],
        "sizes": [b.sizes_B2 for b in batches],
        "orig_sizes": [b.orig_sizes_B2 for b in batches],
        "image_ids": [b.image_ids_B for b in batches],
        "boxes": [np.concatenate(b.boxes_N4) for b in batches],
        "labels": [np.concatenate(b.labels_N) for b in batches],
    }
    columns["skipped"] = pa.array([b.skipped_B for b in batches], pa.list_(pa.string()))
    columns["skipped_partners"] = pa.array(
        [[{"image_id": image_id, "why": why} for image_id, why in b.skipped_partners] for b in batches], _PARTNERS
    )
    return pa.table(columns | {k: pa.array([a.tobytes() for a in v], pa.binary()) for k, v in parts.items()})


def from_table(table: pa.Table) -> Iterator[MicroBatch]:
    """The micro-batches of `to_table`. Pixels are read-only views of the Arrow buffer."""
    for record, pixels in zip(table.drop_columns(["pixels"]).to_pylist(), table["pixels"], strict=True):
        b, h, w = record["images"], record["height"], record["width"]
        counts = np.frombuffer(record["counts"], np.int32)
        arrays = {k: np.frombuffer(record[k], dtype).copy() for k, dtype in _ARRAYS.items()}
        cuts = np.cumsum(counts)[:-1]
        yield MicroBatch(
            record["epoch"],
            record["step"],
            record["index"],
            np.frombuffer(pixels.as_buffer(), np.uint8).reshape(b, h, w, 3),
            arrays["sizes"].reshape(b, 2),
            arrays["orig_sizes"].reshape(b, 2),
            arrays["image_ids"],
            np.split(arrays["boxes"].reshape(-1, 4), cuts),
            np.split(arrays["labels"], cuts),
            tuple(record["skipped"]),
            tuple((partner["image_id"], partner["why"]) for partner in record["skipped_partners"]),
        )
