"""The images that a prediction is asked for, as light columns that are cut into shards. No image is opened here.

`Inputs.read` opens them, shard by shard, wherever the detector is.
"""

from __future__ import annotations

import fnmatch
import glob
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ray_det.data import files, paths
from ray_det.data.coco import parse
from ray_det.data.digest import digest
from ray_det.data.manifest import PLACE, Place
from ray_det.types import UserError
from ray_det.uris import plain

SHARD = "shard_number"
"""Column that every shard has, the same in all of its rows."""
SHARDS, SMALLEST, LARGEST = 64, 64, 1024
"""A prediction has about so many shards, each of so many images."""

_MAGIC = re.compile(r"[*?[]")


class InputImage(NamedTuple):
    """An image of a shard."""

    id: int
    name: str
    read: Callable[[int, float], bytes]
    """Content of its file, of at most so many bytes, for which a storage is waited for so many seconds; raises
    UserError, StorageError."""


@dataclass(frozen=True)
class Inputs:
    """Images to predict, in order."""

    shards: list[pa.Table]  # what `read` takes; their order and cut depend on the input alone
    counts: list[int]  # images of each
    shard_images: int  # of a whole one
    read: Callable[[pa.Table], Iterator[InputImage]]
    digest: str  # hex, changes with the list of images, and with their files where a listing tells

    @property
    def images(self) -> int:
        return sum(self.counts)


def listed_inputs(source: str, ids_from: str | None, shard_images: int | None, output: str) -> Inputs:
    """The images of a folder (searched in depth), a glob, a file, or a URI of these.

    Args:
        ids_from: a COCO JSON whose image ids are taken, by file name; default: 1, 2, … in the order of the names.
        shard_images: images of a shard; default: by their number.
        output: path or URI under which images are none of the input.

    Raises:
        UserError: there is no image, or one that `ids_from` does not have.
    """
    root, names = find(source, output)
    names = paths.images(names)
    if not names:
        raise UserError(f"no images at {source}: looked for {', '.join(paths.IMAGE_SUFFIXES)}, and .parquet")
    stats = [stat or (-1, -1) for stat in files.stats(root, names)]
    table = pa.table({"image_id": np.arange(1, len(names) + 1), "uri": pa.array(names, pa.string())})
    made = digest([root, stats], table, ["uri"])
    return file_inputs(table, root, None, ids_from, shard_images, made)


def file_inputs(
    table: pa.Table, root: str, packed: str | None, ids_from: str | None, shard_images: int | None, made: str
) -> Inputs:
    """Inputs of files by name.

    Args:
        table: image_id and uri, and where images are packed, `PLACE`.
        root: of relative uris, which must not leave it.
        packed: root of packed files.
        made: what tells this list from others.
    """
    for name in set(PLACE) - set(table.column_names):
        table = table.append_column(name, pa.nulls(len(table), pa.string() if name == "shard" else pa.int64()))
    if ids_from is not None:
        ids = pa.array(_ids(table["uri"].to_pylist(), ids_from), pa.int64())
        table = table.set_column(table.column_names.index("image_id"), "image_id", ids)
    require_unique(table["image_id"], ids_from or "the input")
    size = shard_size(len(table), shard_images)
    cuts = range(0, len(table), size)
    shards = [numbered(table.slice(at, size), number) for number, at in enumerate(cuts)]
    about = digest([made, root, packed], table, ["image_id"])
    return Inputs(shards, [len(shard) for shard in shards], size, partial(_read_files, root, packed), about)


def shard_size(images: int, wanted: int | None) -> int:
    return wanted or min(max(images // SHARDS, SMALLEST), LARGEST)


def numbered(shard: pa.Table, number: int) -> pa.Table:
    return shard.append_column(SHARD, pa.array(np.full(len(shard), number, np.int32)))


def require_unique(ids: pa.ChunkedArray, where: str) -> None:
    values, counts = np.unique(ids.to_numpy(), return_counts=True)
    if len(values) != len(ids) or ids.null_count:
        twice = values[counts > 1][:3].tolist()
        raise UserError(f"image ids must be different, and {where} has {twice or 'null'} more than once")


def is_glob(source: str) -> bool:
    """A file of such a name is one."""
    return bool(_MAGIC.search(source)) and (paths.has_scheme(source) or not Path(paths.absolute(source)).exists())


def find(source: str, output: str) -> tuple[str, list[str]]:
    """(root, sorted names of all files under it that `source` names and that are not under `output`)."""
    root, names = _found(paths.absolute(source))
    taken = f"{paths.real(output)}/"

    @cache
    def free(folder: str) -> bool:
        return not f"{paths.real(f'{root}/{folder}')}/".startswith(taken)

    return root, [name for name in names if free(posixpath.dirname(name))]


def _found(source: str) -> tuple[str, list[str]]:
    if not is_glob(source):
        if files.is_file(source):
            root, _, name = source.rpartition("/")
            return root, [name]
        return source, files.listing(source)
    parts = source.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    root = "/".join(parts[:first])
    if paths.has_scheme(source):
        return root, [name for name in files.listing(root) if _fits(name.split("/"), parts[first:])]
    matches = (Path(match) for match in glob.iglob(source, recursive=True))
    return root, sorted(match.relative_to(root).as_posix() for match in matches if match.is_file())


def _fits(name: list[str], pattern: list[str]) -> bool:
    """As `glob` has it, where `**` stands for any folders."""
    if not (name and pattern):
        return not name and not pattern
    if pattern[0] == "**":
        return _fits(name, pattern[1:]) or _fits(name[1:], pattern)
    return fnmatch.fnmatchcase(name[0], pattern[0]) and _fits(name[1:], pattern[1:])


def _ids(names: list[str], ids_from: str) -> list[int]:
    data = parse(files.read_bytes(ids_from), ids_from)
    known = dict(zip(data.file_names, data.image_ids_I.tolist(), strict=True))
    for name in names:
        if name not in known:
            raise UserError(f"{name} is not among the images of {ids_from}")
    return [known[name] for name in names]


def _read_files(root: str, packed: str | None, shard: pa.Table) -> Iterator[InputImage]:
    for row in shard.to_pylist():
        name = row["uri"]
        if row["shard"] is not None:
            place = Place(name, paths.join(packed or "", row["shard"]), row["offset"], row["length"])
            yield InputImage(row["image_id"], name, place.read)
        elif name is None:
            yield InputImage(row["image_id"], "", _no_name)
        else:
            yield InputImage(row["image_id"], name, partial(_read_file, root, name))


def _no_name(max_bytes: int, patience_s: float) -> bytes:
    raise UserError("the input has no name for it")


def _read_file(root: str, name: str, max_bytes: int, patience_s: float) -> bytes:
    if paths.has_scheme(name) or name.startswith("/"):
        return files.read_bytes(plain(name), max_bytes, patience_s)
    if why := paths.leaves_root(name):
        raise UserError(f"refused: {why}; it must name a file under {root}")
    path = paths.join(root, name)
    if paths.is_outside(path, root):
        raise UserError(f"refused: it is a symbolic link that leaves {root}")
    return files.read_bytes(path, max_bytes, patience_s)
