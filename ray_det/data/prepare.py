"""From a COCO JSON to a manifest: preflight, build, cache by content."""

from __future__ import annotations

import hashlib
import json
import posixpath
from dataclasses import replace
from pathlib import Path

from ray_det.data import coco, files, manifest
from ray_det.data.headers import MapChunks, map_in_threads
from ray_det.data.manifest import Manifest, read_manifest, write_manifest
from ray_det.data.preflight import KINDS, WHERE, PreflightReport, inspect
from ray_det.types import DEFAULT_LIMITS, ClassList, ImageLimits, UserError

_LOOKED_FOR = 100
"""Images that are looked for under a candidate root: the first ones may be the missing ones."""
_FORMAT = f"prepare 2, manifest {manifest.FORMAT}"


def prepare(
    source: str,
    images: str | None,
    cache: Path,
    *,
    strict: bool = False,
    limits: ImageLimits = DEFAULT_LIMITS,
    map_chunks: MapChunks = map_in_threads,
) -> tuple[Manifest, PreflightReport | None]:
    """The manifest of a COCO JSON, from the cache where JSON and images are what they were, or of a manifest file.

    Args:
        source: a COCO JSON or a manifest (.parquet).
        images: the root of `file_name`; None looks for it beside the JSON.
        cache: folder of prepared manifests.
        strict: refuse a data set with any error.
        limits: larger image files are unreadable.

    Returns:
        The manifest, and the preflight's report where the source is a JSON.

    Raises:
        UserError: no such file, a broken one, a data set without images, no image found, or refused by `strict`.
    """
    if source.endswith(".parquet"):
        return read_manifest(source), None
    content = files.read_bytes(source)
    data = coco.parse(content, source)
    root = find_root(data, images)
    key = _cache_key(content, data, root, limits)
    table_path, report_path = cache / f"{key}.parquet", cache / f"{key}.preflight.json"
    made = _cached(table_path, report_path, source)
    if made is None:
        made = _make(data, root, map_chunks, limits)
        write_report(made[1], report_path)
        write_manifest(made[0], table_path)  # last: its presence says that both are there
    if strict:
        refuse_errors(made[1], report_path)
    return made


def make(
    source: str,
    images: str | None,
    map_chunks: MapChunks = map_in_threads,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> tuple[Manifest, PreflightReport]:
    """Manifest and report of a COCO JSON, without a cache.

    Raises:
        UserError: as `prepare`.
    """
    data = coco.parse(files.read_bytes(source), source)
    return _make(data, find_root(data, images), map_chunks, limits)


def _make(
    data: coco.CocoData, root: str, map_chunks: MapChunks, limits: ImageLimits
) -> tuple[Manifest, PreflightReport]:
    checked, report = inspect(data, root, map_chunks, limits)
    return manifest.build(checked, root), report


def write_report(report: PreflightReport, path: Path) -> None:
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps(report.to_json(), indent=1))


def refuse_errors(report: PreflightReport, listed: Path) -> None:
    """Raises:
    UserError: the preflight found an error; `listed` is the file that lists them all.
    """
    kinds = [kind for kind in report.findings if KINDS[kind][0] == "error"]
    if kinds:
        raise UserError(
            f"{report.source} is refused as strict: {report.errors} errors ({', '.join(kinds)}), "
            f"for example {report.findings[kinds[0]][0]}; all are listed in {listed}"
        )


def find_root(data: coco.CocoData, images: str | None) -> str:
    """The root of `file_name`: `images`, or the first usual place beside the JSON that holds one of the first images.

    Raises:
        UserError: none of them does.
    """
    if images is not None:
        return files.absolute(images)
    candidates = _usual_roots(files.absolute(data.source))
    for name in data.file_names[:_LOOKED_FOR]:
        if files.leaves_root(name):
            return candidates[0]  # the preflight refuses it, and says why
        for root in candidates:
            if files.is_file(files.join(root, name)):
                return root
    raise UserError(
        f"none of the images of {data.source} (for example {data.file_names[0]}) is under any of "
        f"{', '.join(candidates)}; {WHERE}"
    )


def _usual_roots(source: str) -> list[str]:
    folder, stem = files.parent(source), posixpath.basename(source).removesuffix(".json")
    # COCO's own layout: annotations/instances_val2017.json beside val2017/
    official = f"{files.parent(folder)}/{stem.rsplit('_', 1)[-1]}"
    return [f"{folder}/images", folder, official, f"{folder}/{stem}"]


def _cache_key(content: bytes, data: coco.CocoData, root: str, limits: ImageLimits) -> str:
    """Changes with the JSON, the root, the limits, and any image that changes, comes or goes."""
    digest = hashlib.sha256(f"{_FORMAT}\0{root}\0{limits}\0".encode() + hashlib.sha256(content).digest())
    safe = [name for name in data.file_names if not files.leaves_root(name)]
    for name, stat in zip(safe, files.stats(root, safe), strict=True):
        digest.update(f"{name}\0{stat and tuple(stat)}\0".encode())
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
