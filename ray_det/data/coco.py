"""A COCO detection JSON as columns, exactly as the file has it: nothing is dropped, clipped or reordered here.

Shape legend: I images, M annotations, in the order of the file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_det.types import ClassList, UserError

_INT64 = 2**63
_INT32 = 2**31


@dataclass(frozen=True)
class CocoData:
    source: str
    classes: ClassList
    image_ids_I: np.ndarray  # int64
    file_names: list[str]  # I of them
    declared_I2: np.ndarray  # int64 (h, w) in pixels; -1 where the JSON has none
    annotation_ids_M: np.ndarray  # int64
    image_of_M: np.ndarray  # int64 COCO image ids
    category_of_M: np.ndarray  # int64 COCO category ids
    boxes_M4: np.ndarray  # float64 xywh in pixels
    area_M: np.ndarray  # float64 square pixels; w * h where the JSON has none
    crowd_M: np.ndarray  # bool


def parse(content: bytes, source: str) -> CocoData:
    """Read the text of a COCO JSON; `source` names it in messages.

    Raises:
        UserError: it is not JSON, not COCO, or a record misses a key or has a value of a wrong type.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{source} is not a COCO file: it holds {_brief(document)}, not an object")
    categories, images, annotations = (_records(document, k, source) for k in ("categories", "images", "annotations"))
    if not images:
        raise UserError(f"{source}: empty dataset, it has no images")
    if not categories:
        raise UserError(f"{source} has no categories")
    heights = [_size(r, "height", source) for r in images]
    widths = [_size(r, "width", source) for r in images]
    boxes = [_box(r, source) for r in annotations]
    return CocoData(
        source=source,
        classes=_classes(categories, source),
        image_ids_I=_ids(images, "image", "id", source),
        file_names=[_text(r, "image", "file_name", source) for r in images],
        declared_I2=np.array([heights, widths], np.int64).T,
        annotation_ids_M=_ids(annotations, "annotation", "id", source),
        image_of_M=_ids(annotations, "annotation", "image_id", source),
        category_of_M=_ids(annotations, "annotation", "category_id", source),
        boxes_M4=np.array(boxes, np.float64).reshape(-1, 4),
        area_M=np.array([_area(r, b, source) for r, b in zip(annotations, boxes, strict=True)], np.float64),
        crowd_M=np.array([_crowd(r, source) for r in annotations], bool),
    )


def _records(document: dict, key: str, source: str) -> list[dict]:
    records = document.get(key)
    if not isinstance(records, list):
        what = "no list" if key not in document else _brief(records) + ", not a list,"
        raise UserError(f"{source} is not a COCO detection file: it has {what} under '{key}'")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{source}: {key}[{i}] is {_brief(record)}, not an object")
    return records


def _classes(categories: list[dict], source: str) -> ClassList:
    ids = _ids(categories, "category", "id", source)
    clean = [{"id": int(i), "name": _text(r, "category", "name", source)} for i, r in zip(ids, categories, strict=True)]
    try:
        return ClassList.from_json(clean)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _ids(records: list[dict], kind: str, key: str, source: str) -> np.ndarray:
    """int64 (N,) of an id per record."""
    values = np.empty(len(records), np.int64)
    for i, record in enumerate(records):
        value = record.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not -_INT64 <= value < _INT64:
            raise _wrong(record, kind, key, "a whole number of 64 bits", source, position=i)
        values[i] = value
    return values


def _text(record: dict, kind: str, key: str, source: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        raise _wrong(record, kind, key, "a text", source)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(record, kind, key, "valid Unicode", source) from None
    return value


def _size(record: dict, key: str, source: str) -> int:
    """A declared height or width, -1 where there is none."""
    value = record.get(key)
    if value is None:
        return -1
    if not _is_number(value) or not -_INT32 <= value < _INT32 or value != int(value):
        raise _wrong(record, "image", key, "a whole number of pixels", source)
    return max(int(value), -1)


def _box(record: dict, source: str) -> tuple[float, ...]:
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        raise _wrong(record, "annotation", "bbox", "four numbers", source)
    return tuple(float(v) for v in box)


def _area(record: dict, box: tuple[float, ...], source: str) -> float:
    value = record.get("area")
    if value is None:
        return box[2] * box[3]
    if not _is_number(value):
        raise _wrong(record, "annotation", "area", "a number", source)
    return float(value)


def _crowd(record: dict, source: str) -> bool:
    value = record.get("iscrowd", 0)
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise _wrong(record, "annotation", "iscrowd", "0 or 1", source)
    return bool(value)


def _is_number(value: Any) -> bool:
    """A JSON number, NaN and infinity too, that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 1e308


def _wrong(record: dict, kind: str, key: str, wanted: str, source: str, position: int | None = None) -> UserError:
    name = f"{kind} {_brief(record['id'])}" if "id" in record else f"{kind} without an id {_brief(record)}"
    if key == "id" and position is not None:
        name = f"{kind} number {position + 1}"
    if key not in record:
        return UserError(f"{source}: {name} has no '{key}'")
    return UserError(f"{source}: {name}: {key} is {_brief(record[key])}, not {wanted}")


def _brief(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
