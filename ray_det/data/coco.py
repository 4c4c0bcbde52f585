"""A COCO detection JSON as columns, exactly as the file has it: nothing is dropped, clipped or reordered here.

Shape legend: I images, M annotations, in the order of the file.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_det.data.json_stream import JsonStream
from ray_det.types import ClassList, UserError

Columns = dict[str, Any]
"""Fields of `CocoData` by name."""

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
    relative: bool = False  # boxes and areas are shares of the image, not pixels: what YOLO files have


def parse(content: bytes, source: str) -> CocoData:
    """Read the text of a COCO JSON; `source` names it in messages.

    Records are taken one by one, and what is not needed of them (most of a large file is polygons) is dropped at once.

    Raises:
        UserError: it is not JSON, not COCO, or a record misses a key or has a value of a wrong type.
    """
    try:
        found = _read(JsonStream(content), source)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON: {error}") from error
    parts = [_counting(found, key, source) for key in _TABLES]
    columns: dict[str, Any] = {name: column for part in parts for name, column in part.items()}
    if not columns["file_names"]:
        raise UserError(f"{source}: empty dataset, it has no images")
    if not len(columns["classes"]):
        raise UserError(f"{source} has no categories")
    return CocoData(source=source, **columns)


def _read(stream: JsonStream, source: str) -> dict[str, Columns | UserError]:
    """The columns of every list that is needed, or what is wrong with it. Of equal keys the last counts."""
    found: dict[str, Columns | UserError] = {}
    if stream.peek() != "{":
        value = stream.value()
        stream.end()
        raise UserError(f"{source} is not a COCO file: it holds {_brief(value)}, not an object")
    for key in stream.members():
        if stream.peek() != "[":
            found[key] = _no_list(key, _brief(stream.value()) + ", not a list,", source)
            continue
        elements = stream.elements()
        if key in _TABLES:
            try:
                found[key] = _TABLES[key](_objects(elements, key, source), source)
            except UserError as error:
                found[key] = error
        for _ in elements:  # after an error, and where the list is not needed
            pass
    stream.end()
    return found


def _counting(found: dict[str, Columns | UserError], key: str, source: str) -> Columns:
    part = found.get(key) or _no_list(key, "no list", source)
    if isinstance(part, UserError):
        raise part
    return part


def _no_list(key: str, what: str, source: str) -> UserError:
    return UserError(f"{source} is not a COCO detection file: it has {what} under '{key}'")


def _objects(elements: Iterator[Any], key: str, source: str) -> Iterator[dict]:
    for i, record in enumerate(elements):
        if not isinstance(record, dict):
            raise UserError(f"{source}: {key}[{i}] is {_brief(record)}, not an object")
        yield record


def _categories(records: Iterator[dict], source: str) -> Columns:
    clean = [
        {"id": _id(r, "category", "id", source, position=i), "name": _text(r, "category", "name", source)}
        for i, r in enumerate(records)
    ]
    try:
        return {"classes": ClassList.from_json(clean)}
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _images(records: Iterator[dict], source: str) -> Columns:
    ids, names, declared = array("q"), [], array("q")
    for i, record in enumerate(records):
        ids.append(_id(record, "image", "id", source, position=i))
        names.append(_text(record, "image", "file_name", source))
        declared.extend((_size(record, "height", source), _size(record, "width", source)))
    return {
        "image_ids_I": np.array(ids),
        "file_names": names,
        "declared_I2": np.array(declared).reshape(-1, 2),
    }


def _annotations(records: Iterator[dict], source: str) -> Columns:
    ids, boxes, areas, crowds = array("q"), array("d"), array("d"), array("b")
    for i, record in enumerate(records):
        ids.append(_id(record, "annotation", "id", source, position=i))
        ids.append(_id(record, "annotation", "image_id", source))
        ids.append(_id(record, "annotation", "category_id", source))
        box = _box(record, source)
        boxes.extend(box)
        areas.append(_area(record, box, source))
        crowds.append(_crowd(record, source))
    ids_M3 = np.array(ids).reshape(-1, 3)
    return {
        "annotation_ids_M": ids_M3[:, 0].copy(),
        "image_of_M": ids_M3[:, 1].copy(),
        "category_of_M": ids_M3[:, 2].copy(),
        "boxes_M4": np.array(boxes).reshape(-1, 4),
        "area_M": np.array(areas),
        "crowd_M": np.array(crowds).astype(bool),
    }


_TABLES: dict[str, Callable[[Iterator[dict], str], Columns]] = {
    "categories": _categories,
    "images": _images,
    "annotations": _annotations,
}


def _id(record: dict, kind: str, key: str, source: str, position: int | None = None) -> int:
    """A whole number of 64 bits; `position` names a record whose own id is wrong."""
    value = record.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -_INT64 <= value < _INT64:
        raise _wrong(record, kind, key, "a whole number of 64 bits", source, position=position)
    return value


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
