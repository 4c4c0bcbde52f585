"""Images named by a folder, a glob, a URI or a COCO JSON, as a manifest without annotations."""

from __future__ import annotations

import glob
import json
from pathlib import Path

from ray_det.data import files, paths
from ray_det.data.coco import parse
from ray_det.data.manifest import Manifest, build
from ray_det.data.preflight import inspect
from ray_det.types import DEFAULT_LIMITS, ClassList, ImageLimits, UserError


def image_manifest(
    source: str, classes: ClassList, ids_from: str | None = None, limits: ImageLimits = DEFAULT_LIMITS
) -> Manifest:
    """A manifest of the images that `source` names: a folder (searched in depth), a glob, a file, or a URI of a folder.

    Args:
        ids_from: a COCO JSON whose image ids are taken, by file name; default: 1, 2, … in the order of the names.

    Raises:
        UserError: there is no image, or one that `ids_from` does not have.
    """
    root, names = _find(source)
    if not names:
        raise UserError(f"no images at {source}: looked for {', '.join(paths.IMAGE_SUFFIXES)}")
    ids = _ids(names, ids_from) if ids_from else range(1, len(names) + 1)
    document = {
        "images": [{"id": i, "file_name": name} for i, name in zip(ids, names, strict=True)],
        "annotations": [],
        "categories": classes.to_json(),
    }
    checked, _ = inspect(parse(json.dumps(document).encode(), source), root, limits=limits)
    return build(checked, root)


def _find(source: str) -> tuple[str, list[str]]:
    """(root, sorted names under it)."""
    if paths.has_scheme(source) and not source.startswith("file://"):
        return source.rstrip("/"), paths.images(files.listing(source.rstrip("/")))
    path = Path(paths.absolute(source))
    if path.is_dir():
        return str(path), paths.images(files.listing(str(path)))
    if path.is_file():
        return str(path.parent), [path.name]
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    base = Path(str(path).split("*")[0].split("?")[0].split("[")[0])
    root = base if base.is_dir() else base.parent
    return str(root), paths.images(sorted(m.relative_to(root).as_posix() for m in matches if m.is_file()))


def _ids(names: list[str], ids_from: str) -> list[int]:
    data = parse(files.read_bytes(ids_from), ids_from)
    known = dict(zip(data.file_names, data.image_ids_I.tolist(), strict=True))
    for name in names:
        if name not in known:
            raise UserError(f"{name} is not among the images of {ids_from}")
    return [known[name] for name in names]
