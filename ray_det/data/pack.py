"""Images copied into a few large files, for object stores, where a million small files are slow to list and to open.

A shard is the images' files one after the other. Which image lies where follows from the manifest and the files alone,
and so does the shard's name: packing again goes on where it stopped, and never touches shards of other data.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from ray_det.data import files, paths
from ray_det.data.manifest import SCHEMA, Manifest
from ray_det.types import UserError

_READ_AHEAD = 64
"""Images held in memory while a shard is written."""


def pack(manifest: Manifest, root: str, shard_bytes: int) -> Manifest:
    """Copy every readable image into shard files of about `shard_bytes` under `root` (folder or URI).

    Returns:
        The same data set with the same hash, read from the shards.

    Raises:
        UserError: it is packed already, or an image is gone or changes meanwhile.
    """
    if manifest.shards is not None:
        raise UserError(f"{manifest.source} is packed already, under {manifest.shards}")
    root = paths.absolute(root)
    rows = np.flatnonzero(manifest.table["readable"].to_numpy())
    names = manifest.table["uri"].take(rows).to_pylist()
    stats = files.stats(manifest.root, names)
    if None in stats:
        raise UserError(f"no such file: {paths.join(manifest.root, names[stats.index(None)])}; prepare it again")
    lengths = np.array([stat.size for stat in stats if stat is not None], np.int64)
    shard_of, offsets = _layout(lengths, shard_bytes)
    about = json.dumps([manifest.hash, manifest.root, shard_bytes, stats])
    key = hashlib.sha256(about.encode()).hexdigest()[:12]
    shards = [f"shard-{key}-{n:05d}.bin" for n in range(shard_of[-1] + 1 if len(rows) else 0)]
    cuts = np.searchsorted(shard_of, np.arange(len(shards) + 1)).tolist()
    for shard, found, (start, stop) in zip(shards, files.stats(root, shards), pairwise(cuts), strict=True):
        if found is None or found.size != lengths[start:stop].sum():
            uris = [paths.join(manifest.root, name) for name in names[start:stop]]
            _write(paths.join(root, shard), uris, lengths[start:stop].tolist())
    places = {"shard": [shards[n] for n in shard_of.tolist()], "offset": offsets.tolist(), "length": lengths.tolist()}
    return replace(manifest, table=_placed(manifest.table, rows, places), shards=root)


def _layout(lengths: np.ndarray, shard_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """(shard, offset in it) of images packed in order; one that is larger than a shard has its own."""
    shard_of, offsets = np.zeros_like(lengths), np.zeros_like(lengths)
    shard, used = 0, 0
    for i, length in enumerate(lengths.tolist()):
        if used and used + length > shard_bytes:
            shard, used = shard + 1, 0
        shard_of[i], offsets[i] = shard, used
        used += length
    return shard_of, offsets


def _write(path: str, uris: list[str], lengths: list[int]) -> None:
    with files.writing(path) as temporary, ThreadPoolExecutor(files.READS_AT_ONCE) as pool:
        with temporary.open("wb") as shard:
            for start in range(0, len(uris), _READ_AHEAD):
                part = uris[start : start + _READ_AHEAD]
                for uri, length, content in zip(part, lengths[start:], pool.map(files.read_bytes, part), strict=False):
                    if len(content) != length:
                        raise UserError(f"image {uri} changed while it was packed: pack it again")
                    shard.write(content)


def _placed(table: pa.Table, rows: np.ndarray, places: dict[str, list]) -> pa.Table:
    """The table with these columns at these rows, and null in them elsewhere."""
    for name, values in places.items():
        column = np.full(len(table), None, object)
        column[rows] = values
        field = SCHEMA.field(name)
        table = table.set_column(SCHEMA.get_field_index(name), field, pa.array(column, field.type))
    return table
