"""Images that a Parquet file, or several of them, tells of: a manifest, a column of paths, or the images themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

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


def read_inputs(source: str, ids_from: str | None, shard_images: int | None, output: str) -> Inputs:
    """What `--input` names: as `listed_inputs`, or Parquet files, alone, in a folder or by a glob.

    Raises:
        UserError: there is no image, no column that is known, or an id is there twice.
    """
    root, found = find(source)
    parquet = [name for name in found if name.endswith(".parquet") and not f"{root}/{name}".startswith(f"{output}/")]
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
    content = next((name for name in CONTENTS if name in schema.names and _is_content(schema.field(name).type)), None)
    name = next((n for n in NAMES if n in schema.names and _is_text(schema.field(n).type)), None)
    ids = "image_id" if "image_id" in schema.names else None
    if content is not None:
        if ids_from is not None:
            raise UserError(
                "--ids_from takes names of files; images in a Parquet have their ids in its column image_id"
            )
        return _row_inputs(tables, content, name, ids, shard_images)
    if name is None:
        raise UserError(
            f"{tables[0]} has neither a column of paths ({', '.join(NAMES)}) nor one of images "
            f"({', '.join(CONTENTS)}); it has {', '.join(schema.names)}"
        )
    named = pa.concat_tables([_read(table, [name, *filter(None, [ids])]) for table in tables])
    image_id = named[ids].cast(pa.int64()) if ids else pa.array(np.arange(1, len(named) + 1))
    rows = pa.table({"image_id": image_id, "uri": named[name].cast(pa.string())})
    made = digest([], rows.set_column(1, "uri", rows["uri"].fill_null("")), ["uri"])
    return file_inputs(rows, paths.parent(tables[0]), None, ids_from, shard_images, made)


def _row_inputs(tables: list[str], content: str, name: str | None, ids: str | None, wanted: int | None) -> Inputs:
    """Shards are rows of one row group; only footers and ids are read here."""
    groups = [(table, g, n) for table in tables for g, n in enumerate(_group_rows(table))]
    size = shard_size(sum(n for _, _, n in groups), wanted)
    shards, counts, first = [], [], 1
    for table, group, rows in groups:
        for start in range(0, rows, size):
            count = min(size, rows - start)
            row = {SHARD: len(shards), "parquet": table, "group": group, "start": start, "count": count, "first": first}
            shards.append(pa.Table.from_pylist([row]))
            counts.append(count)
            first += count
    about: list[Any] = [content, name, size]
    for table in tables:
        about.append([table, files.stats(paths.parent(table), [table.rsplit("/", 1)[1]])])
    if ids is not None:
        require_unique(pa.concat_tables([_read(table, [ids]) for table in tables])[ids], "the input")
    if not shards:
        raise UserError(f"no images at {tables[0]}: it has no rows")
    return Inputs(shards, counts, partial(_read_rows, content, name, ids), digest(about, pa.table({}), []))


def _read_rows(content: str, name: str | None, ids: str | None, shard: pa.Table) -> Iterator[InputImage]:
    (part,) = shard.to_pylist()
    columns, passed = [column for column in (content, name, ids) if column is not None], 0
    with _opened(part["parquet"]) as parquet:
        for batch in parquet.iter_batches(READ_ROWS, row_groups=[part["group"]], columns=columns):
            first, passed = passed, passed + len(batch)
            if passed <= part["start"]:
                continue
            for i, row in enumerate(batch.to_pylist(), start=first - part["start"]):
                if 0 <= i < part["count"]:
                    yield _row(row, content, name, ids, part["first"] + i)
            if passed >= part["start"] + part["count"]:
                return


def _row(row: dict[str, Any], content: str, name: str | None, ids: str | None, number: int) -> InputImage:
    value = row[content]
    known = value.get("path") if isinstance(value, dict) else None
    image = value.get("bytes") if isinstance(value, dict) else value
    label = row[name] if name else known

    def read(max_bytes: int, patience_s: float) -> bytes:
        if image is None:
            raise UserError("the input has no bytes for it")
        if len(image) > max_bytes:
            raise UserError(str(files.too_large(len(image), max_bytes)))
        return image

    return InputImage(row[ids] if ids else number, label or "", read)


def _is_content(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _group_rows(path: str) -> list[int]:
    with _opened(path) as parquet:
        return [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]


def _read(path: str, columns: list[str]) -> pa.Table:
    with _opened(path) as parquet:
        return parquet.read(columns)


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """Raises UserError: no Parquet, or a broken one."""
    try:
        with files.open_binary(path) as file:
            yield pq.ParquetFile(file, buffer_size=1 << 20)
    except (OSError, pa.ArrowException) as error:
        kind = StorageError if paths.has_scheme(path) and not isinstance(error, pa.ArrowException) else UserError
        raise kind(f"cannot read {path}: {' '.join(str(error).split())}") from error
