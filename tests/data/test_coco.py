"""A COCO JSON is read as it is, or refused in one line that names file, record and value."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_det.data.coco import parse
from ray_det.types import UserError

DOCUMENT: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "height": 48, "width": 64},
        {"id": 3, "file_name": "b.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4.5], "area": 10, "iscrowd": 1},
        {"id": 2, "image_id": 99, "category_id": 4, "bbox": [5, 6, 7, 8]},
    ],
    "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}],
}


def read(document: Any) -> Any:
    return parse(json.dumps(document).encode(), "x.json")


def test_keeps_every_record_in_order() -> None:
    data = read(DOCUMENT)
    assert data.classes.names == ("dog", "cat") and data.classes.category_ids == (4, 9)
    assert data.file_names == ["a.jpg", "b.jpg"]
    np.testing.assert_array_equal(data.image_ids_I, [7, 3])
    np.testing.assert_array_equal(data.declared_I2, [[48, 64], [-1, -1]])
    np.testing.assert_array_equal(data.annotation_ids_M, [1, 2])
    np.testing.assert_array_equal(data.image_of_M, [7, 99])
    np.testing.assert_array_equal(data.category_of_M, [9, 4])
    np.testing.assert_array_equal(data.boxes_M4, [[1, 2, 3, 4.5], [5, 6, 7, 8]])
    np.testing.assert_array_equal(data.area_M, [10, 56])  # the second is w * h
    np.testing.assert_array_equal(data.crowd_M, [True, False])


def test_reads_nan_and_infinity() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["annotations"][0]["bbox"] = [float("nan"), 0, float("inf"), 1]
    np.testing.assert_array_equal(read(document).boxes_M4[0], [np.nan, 0, np.inf, 1])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("images",), [], "x.json: empty dataset, it has no images"),
        (("images",), {}, "x.json is not a COCO detection file: it has {}, not a list, under 'images'"),
        (("annotations",), None, "x.json is not a COCO detection file: it has null, not a list, under 'annotations'"),
        (("categories",), [], "x.json has no categories"),
        (("categories", 1, "id"), 9, "x.json: category id 9 appears more than once"),
        (("images", 1), "b.jpg", 'x.json: images[1] is "b.jpg", not an object'),
        (("images", 0, "id"), "7", 'x.json: image number 1: id is "7", not a whole number of 64 bits'),
        (("images", 0, "width"), "64", 'x.json: image 7: width is "64", not a whole number of pixels'),
        (("images", 0, "file_name"), 5, "x.json: image 7: file_name is 5, not a text"),
        (("images", 0, "file_name"), "\ud800", 'x.json: image 7: file_name is "\\ud800", not valid Unicode'),
        (("annotations", 1, "bbox"), [1, 2, 3], "x.json: annotation 2: bbox is [1, 2, 3], not four numbers"),
        (("annotations", 1, "bbox"), [1, 2, 3, None], "annotation 2: bbox is [1, 2, 3, null], not four numbers"),
        (("annotations", 1, "bbox"), [1, 2, 3, 10**400], "annotation 2: bbox is [1, 2, 3, 1000"),
        (("annotations", 0, "category_id"), 1.5, "annotation 1: category_id is 1.5, not a whole number of 64 bits"),
        (("annotations", 0, "image_id"), 2**63, "annotation 1: image_id is 9223372036854775808, not a whole number"),
        (("annotations", 0, "area"), "big", 'x.json: annotation 1: area is "big", not a number'),
        (("annotations", 0, "iscrowd"), 2, "x.json: annotation 1: iscrowd is 2, not 0 or 1"),
    ],
)
def test_wrong_value_names_file_record_and_value(path: tuple, value: Any, message: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    _set(document, path, value)
    with pytest.raises(UserError) as caught:
        read(document)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("categories",), "x.json is not a COCO detection file: it has no list under 'categories'"),
        (("annotations", 1, "image_id"), "x.json: annotation 2 has no 'image_id'"),
        (("annotations", 0, "bbox"), "x.json: annotation 1 has no 'bbox'"),
        (("images", 1, "id"), "x.json: image number 2 has no 'id'"),
        (("categories", 0, "name"), "x.json: category 9 has no 'name'"),
    ],
)
def test_missing_key_is_named(path: tuple, message: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    _delete(document, path)
    with pytest.raises(UserError) as caught:
        read(document)
    assert str(caught.value) == message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"[]", b"3", b"null"])
def test_what_is_not_coco_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^x\.json is not (JSON|a COCO file)"):
        parse(content, "x.json")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_mutation_is_read_or_refused_in_one_line(data: st.DataObject) -> None:
    document = copy.deepcopy(DOCUMENT)
    path = data.draw(st.sampled_from(list(_paths(document))))
    if data.draw(st.booleans()):
        _delete(document, path)
    else:
        _set(document, path, data.draw(JSON_VALUES))
    try:
        read(document)
    except UserError as error:
        assert "x.json" in str(error) and "\n" not in str(error)


def _paths(node: Any, here: tuple = ()) -> Any:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield (*here, key)
        yield from _paths(value, (*here, key))


def _set(node: Any, path: tuple, value: Any) -> None:
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value


def _delete(node: Any, path: tuple) -> None:
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
