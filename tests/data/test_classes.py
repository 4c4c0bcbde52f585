"""Classes that are dropped, renamed, merged: targets and ground truth follow, images stay, unknown names fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_det.config import TrainJobConfig
from ray_det.data.classes import Selection, select
from ray_det.data.coco import CocoData, parse
from ray_det.data.headers import map_in_threads
from ray_det.data.manifest import Manifest
from ray_det.data.prepare import make, prepare, same_classes
from ray_det.data.truth import ground_truth
from ray_det.train.start import begin
from ray_det.types import ClassList, UserError

CATEGORIES = {9: "car", 4: "truck", 6: "dog", 2: "bus"}


def data(categories: list[int]) -> CocoData:
    """Annotation k is of categories[k], and of image 1."""
    boxes = [
        {"id": k, "image_id": 1, "category_id": c, "bbox": [k, 0, 1, 1], "iscrowd": k % 2}
        for k, c in enumerate(categories)
    ]
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": boxes,
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
    }
    return parse(json.dumps(document).encode(), "x.json")


@pytest.mark.parametrize(
    ("names", "told_apart"),
    [
        (("a", "b", "c"), ("a", "b", "c")),
        (("a", "b", "a"), ("a (id 1)", "b", "a (id 7)")),
        (("a", "a (id 7)", "a"), ("a (id 1)", "a (id 7) (id 3)", "a (id 7)")),
        (("a", "a (id 1)", "a"), ("a (id 1)", "a (id 1) (id 3)", "a (id 7)")),
        ((), ()),
    ],
)
def test_names_are_told_apart_by_their_ids(names: tuple[str, ...], told_apart: tuple[str, ...]) -> None:
    assert ClassList(names, (1, 3, 7)[: len(names)]).distinct_names == told_apart


@pytest.mark.parametrize(
    ("selection", "classes", "kept", "categories"),
    [
        (Selection(), {2: "bus", 4: "truck", 6: "dog", 9: "car"}, [0, 1, 2, 3, 4, 5], [9, 4, 6, 2, 77, 9]),
        (Selection(("car", "dog")), {6: "dog", 9: "car"}, [0, 2, 4, 5], [9, 6, 77, 9]),
        (Selection((), {"dog": "hound"}), {2: "bus", 4: "truck", 6: "hound", 9: "car"}, [0, 1, 2, 3, 4, 5],
         [9, 4, 6, 2, 77, 9]),
        (Selection((), {"car": "vehicle", "truck": "vehicle"}), {2: "bus", 4: "vehicle", 6: "dog"}, [0, 1, 2, 3, 4, 5],
         [4, 4, 6, 2, 77, 4]),
        (Selection(("bus",), {"car": "bus"}), {2: "bus"}, [0, 3, 4, 5], [2, 2, 77, 2]),
        (Selection(("car",), {"car": "dog", "dog": "car"}), {6: "car"}, [2, 4], [6, 77]),
    ],
)  # fmt: skip
def test_boxes_follow_their_class(
    selection: Selection, classes: dict[int, str], kept: list[int], categories: list[int]
) -> None:
    """An annotation of category 77, which the file does not list, is left for the preflight."""
    chosen = select(data([9, 4, 6, 2, 77, 9]), selection)
    assert dict(zip(chosen.classes.category_ids, chosen.classes.names, strict=True)) == classes
    assert chosen.category_of_M.tolist() == categories
    assert chosen.annotation_ids_M.tolist() == kept
    np.testing.assert_array_equal(chosen.boxes_M4[:, 0], kept)
    assert chosen.crowd_M.tolist() == [k % 2 == 1 for k in kept] and len(chosen.area_M) == len(chosen.image_of_M)
    assert chosen.file_names == ["a.jpg"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(("cars",)), r"classes: x\.json has no class 'cars' \(nearest: 'car' or "),
        (Selection((), {"tuck": "lorry"}), r"rename: x\.json has no class 'tuck' \(nearest: 'truck' or "),
        (Selection(("car",), {"car": "auto"}), r"classes: x\.json has no class 'car' \(nearest: "),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(selection: Selection, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(data([9]), selection)


def test_targets_and_ground_truth_lose_them_and_images_stay(small_coco: dict[str, Path], tmp_path: Path) -> None:
    source = str(small_coco["train"])
    whole, _ = make(source, None)
    chosen = Selection(("round", "box"), {"disc": "round", "triangle": "round"})
    merged, _ = make(source, None, selection=chosen)
    assert merged.classes.to_json() == [{"id": 1, "name": "round"}, {"id": 3, "name": "box"}]
    assert merged.counts == whole.counts  # nothing was dropped
    wanted = [{1: 1, 3: 3, 7: 1}[a["category_id"]] for a in ground_truth(whole)["annotations"]]
    assert [a["category_id"] for a in ground_truth(merged)["annotations"]] == wanted

    boxes, report = make(source, None, selection=Selection(("box",)))
    truth: Any = [a | {"category_id": 3} for a in ground_truth(whole)["annotations"] if a["category_id"] == 3]
    assert ground_truth(boxes)["annotations"] == truth and 0 < len(truth) < whole.counts["boxes"]
    assert ground_truth(boxes)["images"] == ground_truth(whole)["images"]
    assert report.counts["image_without_boxes"] > 0 and report.counts["unknown_category_id"] == 0
    assert len({whole.hash, merged.hash, boxes.hash}) == 3


def test_the_cache_keeps_choices_apart_and_a_manifest_has_made_its_own(
    small_coco: dict[str, Path], tmp_path: Path
) -> None:
    source = str(small_coco["val"])

    def names(*classes: str) -> tuple[str, ...]:
        return prepare(source, None, tmp_path, selection=Selection(classes))[0].classes.names

    assert (names(), names("box"), names("disc"), names("box")) == (
        ("disc", "box", "triangle"), ("box",), ("disc",), ("box",),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"m\.parquet is a manifest: give classes and rename to jobs/prepare\.py"):
        prepare("m.parquet", None, tmp_path, selection=Selection(("box",)))


def test_a_run_uses_one_choice_for_every_split(small_coco: dict[str, Path], tmp_path: Path) -> None:
    def manifests(**data: Any) -> dict[str, Manifest]:
        sources = {split: str(path) for split, path in small_coco.items()}
        config = {"storage": str(tmp_path), "overwrite": True, "data": sources | data}
        return begin(TrainJobConfig.model_validate(config), 0.0, lambda text: None, map_in_threads).manifests

    chosen = manifests(classes=["box", "round"], rename={"disc": "round"})
    assert {m.classes.names for m in chosen.values()} == {("round", "box")} and len(chosen) == 3
    same_classes(chosen["train"], chosen["test"])
    assert all(chosen[split].hash != whole.hash for split, whole in manifests().items())
    with pytest.raises(UserError, match="no class 'bux'.*'box'"):
        manifests(classes=["bux"])
