"""From annotations to a manifest: preflight, build, cache by content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from ray_det.data import files, manifest, paths, sources
from ray_det.data.classes import Selection, select
from ray_det.data.coco import CocoData
from ray_det.data.files import Stat
from ray_det.data.headers import MapChunks, map_in_threads
from ray_det.data.manifest import Manifest, read_manifest, write_manifest
from ray_det.data.preflight import KINDS, WHERE, PreflightReport, inspect
from ray_det.types import DEFAULT_LIMITS, ClassList, ImageLimits, UserError

ALL_CLASSES = Selection()
_LOOKED_FOR = 100
"""Images that are looked for under a candidate root: the first ones may be the missing ones."""
_FORMAT = f"prepare 3, manifest {manifest.FORMAT}"


def prepare(
    source: str,
    images: str | None,
    cache: Path,
    *,
    split: str = "train",
    selection: Selection = ALL_CLASSES,
    strict: bool = False,
    limits: ImageLimits = DEFAULT_LIMITS,
    map_chunks: MapChunks = map_in_threads,
) -> tuple[Manifest, PreflightReport | None]:
    """The manifest of a data set, from the cache where annotations and images are what they were, or of a file.

    Args:
        source: what `sources.read` takes, or a manifest (.parquet).
        images: the root of `file_name`; None: a manifest's own, else it is looked for in the usual places.
        cache: folder of prepared manifests.
        split: the entry of a YOLO data.yaml.
        selection: which classes are used; a manifest has made its choice already.
        strict: refuse a data set with any error.
        limits: larger image files are unreadable.

    Returns:
        The manifest, and the preflight's report where the source is no manifest.

    Raises:
        UserError: no such file, a broken one, a data set without images, no image found, a class that is not there, or
            refused by `strict`.
    """
    if is_manifest(source):
        if selection:
            raise UserError(f"{source} is a manifest: give classes and rename to jobs/prepare.py, which makes it")
        manifest = read_manifest(source)
        if images is None:
            return manifest, None
        if manifest.shards:
            raise UserError(f"{source} is of packed images: --data.images does not move them")
        return replace(manifest, root=paths.absolute(images)), None
    data, root = _read(source, images, split, selection)
    stats = _stats(data, root)
    key = _cache_key(data, root, stats, limits)
    table_path, report_path = cache / f"{key}.parquet", cache / f"{key}.preflight.json"
    made = _cached(table_path, report_path, source)
    if made is None:
        made = _make(data, root, stats, map_chunks, limits)
        write_report(made[1], report_path)
        write_manifest(made[0], table_path)  # last: its presence says that both are there
    if strict:
        refuse_errors(made[1], report_path)
    return made


def make(
    source: str,
    images: str | None,
    map_chunks: MapChunks = map_in_threads,
    *,
    split: str = "train",
    selection: Selection = ALL_CLASSES,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> tuple[Manifest, PreflightReport]:
    """Manifest and report of a data set, without a cache.

    Raises:
        UserError: as `prepare`.
    """
    data, root = _read(source, images, split, selection)
    return _make(data, root, _stats(data, root), map_chunks, limits)


def is_manifest(source: str) -> bool:
    return source.endswith(".parquet")


def _read(source: str, images: str | None, split: str, selection: Selection) -> tuple[CocoData, str]:
    """The chosen annotations and the root of their images."""
    data, roots = sources.read(source, split)
    return select(data, selection), paths.absolute(images) if images is not None else find_root(data, roots)


def _stats(data: CocoData, root: str) -> list[Stat | None]:
    """Of every image, None where there is none; of names that the preflight refuses too."""
    safe = [name for name in data.file_names if not paths.leaves_root(name)]
    found = dict(zip(safe, files.stats(root, safe), strict=True))
    return [found.get(name) for name in data.file_names]


def _make(
    data: CocoData, root: str, stats: list[Stat | None], map_chunks: MapChunks, limits: ImageLimits
) -> tuple[Manifest, PreflightReport]:
    checked, report = inspect(data, root, map_chunks, limits)
    return manifest.build(checked, root, [stat and stat.size for stat in stats]), report


def write_report(report: PreflightReport, path: str | Path) -> None:
    with files.writing(str(path)) as temporary:
        temporary.write_text(json.dumps(report.to_json(), indent=1))


def refuse_errors(report: PreflightReport, listed: str | Path) -> None:
    """Raises:
    UserError: the preflight found an error; `listed` is the file that lists them all.
    """
    kinds = [kind for kind in report.findings if KINDS[kind][0] == "error"]
    if kinds:
        raise UserError(
            f"{report.source} is refused as strict: {report.errors} errors ({', '.join(kinds)}), "
            f"for example {report.findings[kinds[0]][0]}; all are listed in {listed}"
        )


def find_root(data: CocoData, candidates: list[str]) -> str:
    """The first of the candidates that holds one of the first images.

    Raises:
        UserError: none of them does.
    """
    for name in data.file_names[:_LOOKED_FOR]:
        if paths.leaves_root(name):
            return candidates[0]  # the preflight refuses it, and says why
        for root in candidates:
            if files.is_file(paths.join(root, name)):
                return root
    raise UserError(
        f"none of the images of {data.source} (for example {data.file_names[0]}) is under any of "
        f"{', '.join(candidates)}; {WHERE}"
    )


def _cache_key(data: CocoData, root: str, stats: list[Stat | None], limits: ImageLimits) -> str:
    """Changes with what is read of the annotations, the root, the limits, and any image that changes, comes or goes."""
    about = [_FORMAT, root, limits.pixels, limits.bytes, data.relative, data.file_names, data.classes.to_json(), stats]
    digest = hashlib.sha256(json.dumps(about).encode())
    for column in vars(data).values():
        if isinstance(column, np.ndarray):
            digest.update(f"{column.shape}\0".encode() + column.tobytes())
    return digest.hexdigest()[:32]


def _cached(table_path: Path, report_path: Path, source: str) -> tuple[Manifest, PreflightReport] | None:
    """What an earlier run left, under the name that the source has now; None where it is not there or not whole."""
    try:
        found = read_manifest(table_path)
        report = PreflightReport.from_json(json.loads(report_path.read_text()))
    except (UserError, OSError, ValueError, TypeError, KeyError):
        return None
    return replace(found, source=source), replace(report, source=source)


def same_classes(train: Manifest, other: Manifest) -> None:
    """Raises:
    UserError: the splits do not have the same categories; the message shows where they differ.
    """
    same_categories(train.classes, train.source, other.classes, other.source)


def same_categories(one: ClassList, one_name: str, other: ClassList, other_name: str) -> None:
    """Raises:
    UserError: ids or names of two lists of categories differ.
    """
    a, b = (dict(zip(c.category_ids, c.names, strict=True)) for c in (one, other))
    different = [i for i in sorted(a.keys() | b.keys()) if a.get(i) != b.get(i)]
    if different:
        shown = ", ".join(f"id {i}: {a.get(i, 'none')} / {b.get(i, 'none')}" for i in different[:5])
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise UserError(f"categories differ between {one_name} and {other_name} ({shown}{more})")
