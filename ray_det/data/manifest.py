"""The manifest: one row per image, one Parquet file per data set, everything that training and evaluation need to know.

Boxes are xywh float64 exactly as the JSON has them. Which of them may be trained on is said beside them, so that
evaluation still sees the data set as it was annotated.

Shape legend: R rows, M annotations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_det.data import files, paths
from ray_det.data.checks import Checked
from ray_det.data.digest import digest
from ray_det.retry import PATIENCE_S
from ray_det.types import ClassList, UserError

FORMAT = 2
"""Version of columns and metadata; a cached manifest of another version is made anew."""

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),  # `file_name` of the JSON
        ("height", pa.int32()),  # stored pixels where readable, else as declared
        ("width", pa.int32()),
        ("readable", pa.bool_()),  # the file is there and its header opens
        ("trainable", pa.bool_()),  # may be a training image
        ("problem", pa.string()),  # why it may not
        ("orientation", pa.int8()),  # EXIF, 1 where there is none; never applied
        ("annotation_ids", pa.list_(pa.int64())),  # this and the lists below: one entry per annotation
        ("boxes", pa.list_(pa.list_(pa.float64(), 4))),  # xywh in pixels, as given
        ("labels", pa.list_(pa.int32())),  # contiguous
        ("area", pa.list_(pa.float64())),  # square pixels
        ("iscrowd", pa.list_(pa.int8())),
        ("box_ok", pa.list_(pa.bool_())),  # usable as a training target, if its image is trainable
        ("positions", pa.list_(pa.int64())),  # index among the JSON's annotations
        ("shard", pa.string()),  # the file under `shards` that the image is packed in, null where it is not
        ("offset", pa.int64()),  # its first byte there
        ("length", pa.int64()),  # bytes of the image; null where it is not known
    ]
)
_HASHED = 1
"""Version of what the hash covers: a change makes every running experiment see other data."""
PLACE = ("shard", "offset", "length")
"""Where the bytes are. Not part of the hash: packing leaves the data what it was."""
_PROSE = ("problem",)
METADATA_KEY = b"ray_det.manifest"
MAX_EXPANSION = 64
"""Bytes in memory per byte of a file. Manifests have about ten: ids are all different."""
_BATCH_ROWS = 10_000


class Place(NamedTuple):
    """Where the bytes of an image are: a file of their own, or a part of a shard file."""

    uri: str
    shard: str | None
    offset: int | None
    length: int | None

    @property
    def name(self) -> str:
        """For messages."""
        return self.uri if self.shard is None else f"{self.uri} (byte {self.offset} of {self.shard})"

    def read(self, max_bytes: int | None = None, patience_s: float = PATIENCE_S) -> bytes:
        """Raises:
        UserError: it cannot be read, is larger, or the shard is too short.
        """
        if self.shard is None or self.offset is None or self.length is None:
            return files.read_bytes(self.uri, max_bytes, patience_s)
        if max_bytes is not None and self.length > max_bytes:
            raise UserError(f"cannot read {self.name}: {files.too_large(self.length, max_bytes)}")
        return files.read_range(self.shard, self.offset, self.length, patience_s)


@dataclass(frozen=True)
class Manifest:
    table: pa.Table
    classes: ClassList
    root: str  # of the uris: an absolute local path or a URI
    source: str  # the JSON it was made of
    hash: str  # hex, of rows and classes: a data set that moves keeps it
    shards: str | None = None  # root of the shard files, as `root`; None where nothing is packed

    def __len__(self) -> int:
        return self.table.num_rows

    def uri(self, row: int) -> str:
        return paths.join(self.root, self.table["uri"][row].as_py())

    def place(self, row: int) -> Place:
        return self.places(self.table.slice(row, 1))[0]

    def places(self, rows: pa.Table | Mapping[str, pa.Array]) -> list[Place]:
        """Of the rows of its table, or some of them, that have at least `uri` and `PLACE`."""
        uris = (paths.join(self.root, name) for name in rows["uri"].to_pylist())
        shards = (name and paths.join(self.shards or "", name) for name in rows["shard"].to_pylist())
        return list(map(Place, uris, shards, rows["offset"].to_pylist(), rows["length"].to_pylist()))

    def trainable_rows(self) -> np.ndarray:
        """int64 (N,)"""
        return np.flatnonzero(self.table["trainable"].to_numpy())

    @cached_property
    def counts(self) -> dict[str, int]:
        """Images, boxes (crowds and defects too), and what of both training sees."""
        trainable = self.table.filter(self.table["trainable"])
        return {
            "images": len(self),
            "boxes": len(flat(self.table, "box_ok")),
            "trainable_images": trainable.num_rows,
            "trainable_boxes": flat(trainable, "box_ok").true_count,
        }


def build(checked: Checked, root: str, lengths: Sequence[int | None] | None = None) -> Manifest:
    """The manifest of a checked COCO file whose images lie under `root`; `lengths`: bytes of each entry's file."""
    data, entries_R = checked.data, checked.entries_R
    kept_M = np.flatnonzero((checked.rows_M >= 0) & (checked.labels_M >= 0))
    kept_M = kept_M[np.argsort(checked.rows_M[kept_M], kind="stable")]
    offsets = np.searchsorted(checked.rows_M[kept_M], np.arange(len(entries_R) + 1)).astype(np.int32)
    flat_boxes = pa.FixedSizeListArray.from_arrays(pa.array(data.boxes_M4[kept_M].ravel()), 4)
    per_box = {
        "annotation_ids": data.annotation_ids_M[kept_M],
        "boxes": flat_boxes,
        "labels": checked.labels_M[kept_M],
        "area": data.area_M[kept_M],
        "iscrowd": data.crowd_M[kept_M].astype(np.int8),
        "box_ok": checked.usable_M[kept_M],
        "positions": kept_M,
    }
    per_image: dict[str, Any] = {
        "image_id": data.image_ids_I[entries_R],
        "uri": [data.file_names[i] for i in entries_R],
        "height": checked.heights_I[entries_R],
        "width": checked.widths_I[entries_R],
        "readable": checked.readable_I[entries_R],
        "trainable": checked.trainable_I[entries_R],
        "problem": [_problem(checked, int(i)) for i in entries_R],
        "orientation": [checked.headers[i].orientation for i in entries_R],
        "shard": [None] * len(entries_R),
        "offset": [None] * len(entries_R),
        "length": [lengths and lengths[i] for i in entries_R],
    }
    columns = [
        pa.array(per_image[f.name], f.type) if f.name in per_image else _lists(offsets, per_box[f.name], f.type)
        for f in SCHEMA
    ]
    table = pa.table(columns, schema=SCHEMA)
    return Manifest(table, data.classes, root, data.source, content_hash(table, data.classes))


def content_hash(table: pa.Table, classes: ClassList) -> str:
    """sha256 of classes and rows, but for prose and for where the images are."""
    names = [name for name in table.column_names if name not in (*_PROSE, *PLACE)]
    return digest([_HASHED, classes.to_json()], table, names)


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Write a Parquet file, local or at a URI, in one move: nobody sees half of it."""
    about = {
        "format": FORMAT,
        "classes": manifest.classes.to_json(),
        "counts": manifest.counts,
        "root": manifest.root,
        "source": manifest.source,
        "hash": manifest.hash,
        "shards": manifest.shards,
        "places": digest([manifest.shards], manifest.table, PLACE),
    }
    table = manifest.table.replace_schema_metadata({METADATA_KEY: json.dumps(about)})
    with files.writing(str(path)) as temporary:
        pq.write_table(table, temporary)


def read_manifest(path: str | Path) -> Manifest:
    """Raises:
    UserError: there is no such file, or it is no manifest, a broken one, or one of another version.
    """
    content = files.read_bytes(str(path))
    try:
        table = _read_table(content)
        about = json.loads((table.schema.metadata or {})[METADATA_KEY])
        if about["format"] != FORMAT:
            raise UserError(f"{path} is a manifest of version {about['format']}, not {FORMAT}: prepare it again")
        table = table.replace_schema_metadata(None)
        classes = ClassList.from_json(about["classes"])
        intact = (
            table.schema.equals(SCHEMA)
            and content_hash(table, classes) == about["hash"]
            and digest([about["shards"]], table, PLACE) == about["places"]
        )
        root, source = paths.absolute(str(about["root"])), str(about["source"])  # file:// would hide links
    except UserError:
        raise
    except Exception as error:  # a broken file can make pyarrow and what follows raise nearly anything
        reason = " ".join(str(error).split())
        what = "is not a manifest" if isinstance(error, KeyError) else f"cannot be read as a manifest ({reason})"
        raise UserError(f"{path} {what}: " + "write one with jobs/prepare.py") from error
    if not intact:
        raise UserError(f"{path} is a damaged manifest: its content does not fit its hash")
    paths.require_inside(root, table["uri"].to_pylist())
    paths.require_inside(str(about["shards"]), table["shard"].drop_null().unique().to_pylist())
    return Manifest(table, classes, root, source, about["hash"], about["shards"])


def _read_table(content: bytes) -> pa.Table:
    """Batch by batch: equal values take no room in a file, so a small one can ask for all of the memory.

    Raises:
        ValueError: it unpacks to far more than any manifest.
    """
    parquet = pq.ParquetFile(pa.BufferReader(content))
    batches, unpacked = [], 0
    for batch in parquet.iter_batches(_BATCH_ROWS):
        unpacked += batch.nbytes
        if unpacked > MAX_EXPANSION * len(content):
            raise ValueError(f"its {len(content)} bytes unpack to more than {MAX_EXPANSION} times as many")
        batches.append(batch)
    return pa.Table.from_batches(batches, parquet.schema_arrow)


def flat(table: pa.Table, name: str) -> pa.Array:
    """The values of a list column, one after the other."""
    return table[name].combine_chunks().flatten()


def _lists(offsets: np.ndarray, values: np.ndarray | pa.Array, kind: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind.value_type), type=kind)


def _problem(checked: Checked, entry: int) -> str | None:
    if checked.trainable_I[entry]:
        return None
    if not checked.readable_I[entry]:
        return checked.headers[entry].problem
    for kind, text in (
        ("size_turned", "size is declared as EXIF turns it"),
        ("size_mismatch", "size is not as declared"),
    ):
        if checked.image_marks[kind][entry]:
            return text
    return "several files share this image id"
