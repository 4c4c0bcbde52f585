"""A YOLO data.yaml as the columns of a COCO file: `train`, `val` and `test` name images, text files beside have boxes.

The labels of `…/images/a.jpg` are in `…/labels/a.txt`, a line per object: class, centre x, centre y, width, height as
shares of the image, or class and the corners of a polygon. Without the file the image has no boxes. A class is its
number in `names`, and so is its category id.

Shape legend: M annotations.
"""

from __future__ import annotations

import posixpath
from typing import Any

import numpy as np

from ray_det import boxes, yaml12
from ray_det.data import files, paths
from ray_det.data.coco import CocoData
from ray_det.types import ClassList, UserError

_MOST_CLASSES = 2**31
_ROUNDING = 2e-6
"""Shares usually have six decimals: an edge that passes the border by no more lies on it."""


def read(source: str, split: str) -> tuple[CocoData, list[str]]:
    """The images of one entry of a data.yaml, sorted by path, and the root of their names.

    Boxes are shares of the image (`CocoData.relative`) until the preflight knows its size.

    Raises:
        UserError: no such entry or folder, no images, or a broken line; named with file and value.
    """
    tree = yaml12.read_mapping(files.read_text(source), source)
    classes = _classes(tree.get("names"), source)
    entries = tree.get(split)
    if not entries:
        raise UserError(f"{source} has no '{split}' entry")
    base = _base(source, tree.get("path"))
    paths = sorted({path for entry in _texts(entries, split, source) for path in _images(base, entry, split, source)})
    if not paths:
        raise UserError(f"{source}: empty dataset, its '{split}' entry has no images")
    root = base if all(path.startswith(f"{base}/") for path in paths) else _common(paths)
    label_paths = [_label_path(path) for path in paths]
    labels = zip(label_paths, files.read_all(label_paths), strict=True)
    parts = [_boxes(content, path) for path, content in labels]
    return _columns([path.removeprefix(f"{root}/") for path in paths], parts, classes, source), [root]


def _classes(names: Any, source: str) -> ClassList:
    by_id = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(by_id, dict) or not by_id:
        raise UserError(f"{source} has no classes: 'names' must be a list, or a mapping from number to name")
    for number, name in by_id.items():
        whole = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < _MOST_CLASSES
        if not whole or not isinstance(name, (str, int, float)):
            raise UserError(f"{source}: names: {number!r}: {name!r} is not a number from 0 and a name")
    return ClassList.from_json([{"id": number, "name": str(name)} for number, name in by_id.items()])


def _texts(value: Any, key: str, source: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    for text in values:
        if not isinstance(text, str) or not text:
            raise UserError(f"{source}: {key}: {text!r} is not a folder or a list file")
    return values


def _base(source: str, path: Any) -> str:
    """What entries start from: `path`, where there is such a folder (data sets move), else the folder of the file."""
    folder = paths.parent(paths.absolute(source))
    base = _under(folder, path) if isinstance(path, str) else folder
    return base if files.is_folder(base) else folder


def _under(base: str, name: str) -> str:
    """Joined, or the name alone where it is absolute or a URI; without `.` and `..`."""
    alone = name.startswith("/") or paths.has_scheme(name)
    scheme, separator, path = paths.absolute(name if alone else paths.join(base, name)).rpartition("://")
    return f"{scheme}{separator}{posixpath.normpath(path)}"


def _images(base: str, entry: str, split: str, source: str) -> list[str]:
    """The images in a folder, at any depth, or in a list file, whose lines start from its own folder."""
    # Some exports say `../train/images` in a file that lies beside train/.
    for path in dict.fromkeys([_under(base, entry), _under(base, entry.removeprefix("../"))]):
        if entry.endswith(".txt") and files.is_file(path):
            lines = filter(None, map(str.strip, files.read_text(path).splitlines()))
            return [_under(paths.parent(path), line) for line in lines]
        if files.is_folder(path):
            return [f"{path}/{name}" for name in paths.images(files.listing(path))]
    raise UserError(f"{source}: {split}: there is no folder or list file {_under(base, entry)}")


def _common(images: list[str]) -> str:
    """The deepest folder that holds all of them."""
    folder = paths.parent(images[0])
    while not all(image.startswith(f"{folder}/") for image in images):
        folder = paths.parent(folder)
    return folder


def _label_path(image: str) -> str:
    head, found, tail = image.rpartition("/images/")
    return posixpath.splitext(f"{head}/labels/{tail}" if found else image)[0] + ".txt"


def _boxes(content: bytes | None, path: str) -> np.ndarray:
    """float64 (n, 5) of the lines of a label file: class, then x, y, width, height as shares."""
    rows = []
    for number, line in enumerate((content or b"").decode("utf-8-sig", errors="replace").splitlines(), start=1):
        if words := line.split():
            rows.append(_row(words, f"{path} line {number}"))
    return np.array(rows, np.float64).reshape(-1, 5)


def _row(words: list[str], where: str) -> tuple[float, ...]:
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            raise UserError(f"{where}: {word!r} is not a number") from None
    label, *shares = values
    if not label.is_integer() or not 0 <= label < _MOST_CLASSES:
        raise UserError(f"{where}: class {words[0]!r} is not a whole number from 0")
    if len(shares) == 4:
        cx, cy, w, h = shares
        return label, cx - w / 2, cy - h / 2, w, h
    if len(shares) < 6 or len(shares) % 2:
        raise UserError(f"{where} has {len(words)} values; a class and a box are 5, a class and a polygon 7, 9, …")
    xs, ys = shares[::2], shares[1::2]
    return label, min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def _columns(names: list[str], parts: list[np.ndarray], classes: ClassList, source: str) -> CocoData:
    rows_M5 = np.concatenate(parts)
    boxes_M4 = _on_the_border(rows_M5[:, 1:])
    ids_I = np.arange(1, len(names) + 1)
    return CocoData(
        source=source,
        classes=classes,
        image_ids_I=ids_I,
        file_names=names,
        declared_I2=np.full((len(names), 2), -1),
        annotation_ids_M=np.arange(1, len(rows_M5) + 1),
        image_of_M=np.repeat(ids_I, [len(part) for part in parts]),
        category_of_M=rows_M5[:, 0].astype(np.int64),
        boxes_M4=boxes_M4,
        area_M=boxes_M4[:, 2] * boxes_M4[:, 3],
        crowd_M=np.zeros(len(rows_M5), bool),
        relative=True,
    )


def _on_the_border(boxes_M4: np.ndarray) -> np.ndarray:
    """xywh shares, with edges that pass the border by rounding alone put on it."""
    corners_M4 = boxes.xywh_to_xyxy(boxes_M4)
    inside_M4 = boxes.clip(corners_M4, 1, 1)
    off_M4 = np.abs(np.where(np.isfinite(corners_M4), corners_M4 - inside_M4, np.inf))
    return boxes.xyxy_to_xywh(np.where(off_M4 <= _ROUNDING, inside_M4, corners_M4))
