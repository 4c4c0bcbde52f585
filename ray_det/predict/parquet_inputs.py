"""Images that a Parquet file, or several of them, tells of: a manifest, a column of paths, or the images themselves."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_det.data import files, paths
from ray_det.data.digest import digest
from ray_det.data.manifest import METADATA_KEY, PLACE, read_manifest
from ray_det.predict.inputs import (
    SHARD,
    InputImage,
    Inputs,
    file_inputs,
    find,
    is_glob,
    listed_inputs,
    require_unique,
    shard_size,
)
from ray_det.storage import StorageError
from ray_det.types import UserError

NAMES = ("uri", "path", "file_name")
CONTENTS = ("bytes", "image_bytes", "image", "content")
"""Columns that are looked for, in this order. A content is binary, or a struct with `bytes` and perhaps `path`."""
READ_ROWS = 16
"""Images that are in memory at once, beside those that wait for the detector."""


class _Columns(NamedTuple):
    """Those that are read of every file."""

    content: str | None
    name: str | None
    ids: str | None
    first: str  # the file that they were found in


def read_inputs(source: str, ids_from: str | None, shard_images: int | None, output: str) -> Inputs:
    """What `--input` names: as `listed_inputs`, or Parquet files, alone, in a folder or by a glob.

    Raises:
        UserError: there is no image, no column that is known, a file without one that the first has, or an id is there
            twice.
    """
    root, found = find(source, output)
    parquet = [name for name in found if name.endswith(".parquet")]
    if not parquet and source.endswith(".parquet") and not is_glob(source):
        raise UserError(f"no such file: {source}")
    if not parquet or paths.images(found):
        return listed_inputs(source, ids_from, shard_images, output)
    tables = [paths.join(root, name) for name in parquet]
    with _opened(tables[0]) as file:
        schema = file.schema_arrow
    if len(tables) == 1 and METADATA_KEY in (schema.metadata or {}):
        manifest = read_manifest(tables[0])
        rows = manifest.table.select(["image_id", "uri", *PLACE])
        made = digest([manifest.hash], rows, PLACE)
        return file_inputs(rows, manifest.root, manifest.shards, ids_from, shard_images, made)
    columns = _columns(schema, tables[0])
    if columns.content is None:
        return _named_inputs(root, parquet, columns, ids_from, shard_images)
    if ids_from is not None:
        raise UserError("--ids_from takes names of files; images in a Parquet have their ids in its column image_id")
    return _row_inputs(tables, columns, shard_images)


def _columns(schema: pa.Schema, path: str) -> _Columns:
    content = next((name for name in CONTENTS if name in schema.names and _is_content(schema.field(name).type)), None)
    name = next((n for n in NAMES if n in schema.names and _is_text(schema.field(n).type)), None)
    if content is None and name is None:
        raise UserError(
            f"{path} has neither a column of paths ({', '.join(NAMES)}) nor one of images "
            f"({', '.join(CONTENTS)}); it has {', '.join(schema.names)}"
        )
    return _Columns(content, name, "image_id" if "image_id" in schema.names else None, path)


def _named_inputs(
    root: str, tables: list[str], columns: _Columns, ids_from: str | None, shard_images: int | None
) -> Inputs:
    """Of files under `root` that name images, each relative to its own folder."""
    folders = [posixpath.dirname(table) for table in tables]
    shared = posixpath.commonpath(folders)  # a file alone has its names as they are
    parts = []
    for table, folder in zip(tables, folders, strict=True):
        part = _read(paths.join(root, table), columns)
        below = folder[len(shared) :].lstrip("/")
        parts.append(part.set_column(0, "uri", pa.array(_below(below, part["uri"].to_pylist()), pa.string())))
    rows = pa.concat_tables(parts)
    if columns.ids is None:
        rows = rows.append_column("image_id", pa.array(np.arange(1, len(rows) + 1)))
    made = digest([], rows.set_column(0, "uri", rows["uri"].fill_null("")), ["uri"])
    return file_inputs(rows, paths.join(root, shared).rstrip("/"), None, ids_from, shard_images, made)


def _below(folder: str, names: list[str | None]) -> list[str | None]:
    if not folder:
        return names
    absolute = (name is None or paths.has_scheme(name) or name.startswith("/") for name in names)
    return [name if alone else f"{folder}/{name}" for name, alone in zip(names, absolute, strict=True)]


def _row_inputs(tables: list[str], columns: _Columns, wanted: int | None) -> Inputs:
    """Shards are rows of one row group; only footers and ids are read here."""
    groups = [(table, g, n) for table in tables for g, n in enumerate(_group_rows(table, columns))]
    size = shard_size(sum(n for _, _, n in groups), wanted)
    shards, counts, first = [], [], 1
    for table, group, rows in groups:
        for start in range(0, rows, size):
            count = min(size, rows - start)
            row = {SHARD: len(shards), "parquet": table, "group": group, "start": start, "count": count, "first": first}
            shards.append(pa.Table.from_pylist([row]))
            counts.append(count)
            first += count
    about: list[Any] = [columns.content, columns.name]
    for table in tables:
        about.append([table, files.stats(paths.parent(table), [table.rsplit("/", 1)[1]])])
    if columns.ids is not None:
        alone = columns._replace(name=None)
        require_unique(pa.concat_tables([_read(table, alone) for table in tables])["image_id"], "the input")
    if not shards:
        raise UserError(f"no images at {tables[0]}: it has no rows")
    return Inputs(shards, counts, size, partial(_read_rows, columns), digest(about, pa.table({}), []))


def _read_rows(columns: _Columns, shard: pa.Table) -> Iterator[InputImage]:
    (part,) = shard.to_pylist()
    wanted, passed = list(filter(None, (columns.content, columns.name, columns.ids))), 0
    with _opened(part["parquet"]) as parquet:
        for batch in parquet.iter_batches(READ_ROWS, row_groups=[part["group"]], columns=wanted):
            first, passed = passed, passed + len(batch)
            if passed <= part["start"]:
                continue
            for i, row in enumerate(batch.to_pylist(), start=first - part["start"]):
                if 0 <= i < part["count"]:
                    yield _row(row, columns, part["first"] + i)
            if passed >= part["start"] + part["count"]:
                return


def _row(row: dict[str, Any], columns: _Columns, number: int) -> InputImage:
    assert columns.content
    value = row[columns.content]
    known = value.get("path") if isinstance(value, dict) else None
    image = value.get("bytes") if isinstance(value, dict) else value
    label = row[columns.name] if columns.name else known

    def read(max_bytes: int, patience_s: float) -> bytes:
        if image is None:
            raise UserError("the input has no bytes for it")
        if len(image) > max_bytes:
            raise UserError(str(files.too_large(len(image), max_bytes)))
        return image

    return InputImage(int(row[columns.ids]) if columns.ids else number, label or "", read)


def _is_content(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)  # pandas makes floats of ids


def _require(schema: pa.Schema, columns: _Columns, path: str) -> None:
    """Raises UserError: a file is not as the first one."""
    kinds = ((_is_content, "images"), (_is_text, "text"), (_is_number, "numbers"))
    for name, (fits, what) in zip(columns[:3], kinds, strict=True):
        if name is None:
            continue
        if name not in schema.names:
            raise UserError(f"{path} has no column {name}, as {columns.first} has; it has {', '.join(schema.names)}")
        if not fits(schema.field(name).type):
            raise UserError(f"{path}: {name} must be {what}, and is {schema.field(name).type}")


def _group_rows(path: str, columns: _Columns) -> list[int]:
    with _opened(path) as parquet:
        _require(parquet.schema_arrow, columns, path)
        return [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]


def _read(path: str, columns: _Columns) -> pa.Table:
    """uri and image_id, as far as there are columns for them."""
    with _opened(path) as parquet:
        _require(parquet.schema_arrow, columns, path)
        table = parquet.read(list(filter(None, (columns.name, columns.ids))))
    found = {"uri": table[columns.name].cast(pa.string())} if columns.name else {}
    try:
        return pa.table(found | ({"image_id": table[columns.ids].cast(pa.int64())} if columns.ids else {}))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: {columns.ids} must be whole numbers: {error}") from error


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """Raises UserError: no Parquet, or a broken one."""
    try:
        with files.open_binary(path) as file:
            # Buffered ahead, all of a row group would be read for a few of its rows.
            yield pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        kind = StorageError if paths.has_scheme(path) and not isinstance(error, pa.ArrowException) else UserError
        raise kind(f"cannot read {path}: {' '.join(str(error).split())}") from error
