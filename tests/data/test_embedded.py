"""The embedded data set: deterministic, varied, boxes tight to what is drawn, clean in the preflight."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_det.data.embedded import CATEGORIES, VERSION, draw_scene, generate
from ray_det.data.preflight import require_trainable
from ray_det.data.prepare import make, same_classes

SIZES = {"train": 60, "val": 12, "test": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return generate(tmp_path_factory.mktemp("embedded"), **SIZES)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_splits_have_their_size_and_share_no_picture(made: dict[str, Path]) -> None:
    assert {split: len(load(path)["images"]) for split, path in made.items()} == SIZES
    pictures = [p.read_bytes() for p in (made["train"].parent / "images").iterdir()]
    assert len(pictures) == len(set(pictures)) == sum(SIZES.values())


def test_preflight_finds_nothing_but_what_was_meant(made: dict[str, Path]) -> None:
    manifests = []
    for path in made.values():
        manifest, report = make(str(path), None)
        assert {k for k, n in report.counts.items() if n} <= {"crowd", "image_without_boxes"}
        require_trainable(manifest)
        manifests.append(manifest)
    same_classes(manifests[0], manifests[1])
    assert manifests[0].classes.category_ids == (1, 3, 7)  # gaps, as in COCO


def test_pictures_and_objects_vary(made: dict[str, Path]) -> None:
    train = load(made["train"])
    sizes = np.array([(i["height"], i["width"]) for i in train["images"]])
    assert sizes.min() >= 160 and sizes.max() <= 485
    aspect = sizes[:, 1] / sizes[:, 0]
    assert aspect.min() < 0.6 and aspect.max() > 1.7 and 0.49 < aspect.min() and aspect.max() < 2.05
    assert len({tuple(s) for s in sizes}) > 50
    objects = [a for a in train["annotations"] if not a["iscrowd"]]
    assert min(Counter(a["category_id"] for a in objects).values()) > 0.2 * len(objects)
    side = np.sqrt([a["bbox"][2] * a["bbox"][3] for a in objects])
    assert side.min() >= 16 and side.min() < 32 and side.max() > 96  # COCO's small, medium and large


def test_shares_of_empty_pictures_and_crowds() -> None:
    scenes = [draw_scene(np.random.default_rng(i)) for i in range(100)]
    assert 1 <= sum(not s.things for s in scenes) <= 14
    assert 1 <= sum(t.crowd for s in scenes for t in s.things) <= 16


@pytest.mark.parametrize("seed", range(12))
def test_boxes_are_tight_to_the_drawn_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng)
    height, width = scene.owner_HW.shape
    assert scene.pixels_HW3.shape == (height, width, 3) and scene.pixels_HW3.dtype == np.uint8
    for index, thing in enumerate(scene.things, start=1):
        x, y, w, h = thing.box
        mask = scene.owner_HW == index
        inside = mask[y : y + h, x : x + w]
        assert 0 <= x and 0 <= y and x + w <= width and y + h <= height
        assert inside.sum() == mask.sum() == thing.area  # nothing is left out
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()  # nothing is spare
        assert thing.category_id in CATEGORIES


def test_owner_is_what_the_pixels_show(made: dict[str, Path]) -> None:
    """Around an object's edge the stored JPEG changes colour: boxes belong to the pictures on disk."""
    train = load(made["train"])
    names = {i["id"]: i["file_name"] for i in train["images"]}
    contrast = []
    for annotation in train["annotations"]:
        if annotation["iscrowd"] or annotation["category_id"] != 1:
            continue
        x, y, w, h = annotation["bbox"]
        pixels = np.asarray(Image.open(made["train"].parent / "images" / names[annotation["image_id"]])).astype(float)
        middle = pixels[y + h // 2, x + w // 2 - 3 : x + w // 2 + 3].mean(axis=0)
        corner = pixels[y + 1, x + 1]  # a disc leaves the corners of its box free
        contrast.append(np.linalg.norm(middle - corner))
    assert np.median(contrast) > 60


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    small = {"train": 3, "val": 1, "test": 1}
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        generate(tmp_path / folder, seed=seed, **small)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.j*") if p.name != "done.json")
    assert len(files) == 5 + 3
    for name in files:
        first, same, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == same and first != other


def test_second_call_does_nothing_and_a_half_made_folder_is_made_anew(tmp_path: Path) -> None:
    small = {"train": 2, "val": 1, "test": 1}
    paths = generate(tmp_path, **small)
    picture = tmp_path / "images" / "train_0001.jpg"
    before = picture.stat().st_mtime_ns
    assert generate(tmp_path, **small) == paths and picture.stat().st_mtime_ns == before
    (tmp_path / "done.json").unlink()  # as a killed call leaves it
    picture.write_bytes(b"half")
    generate(tmp_path, **small)
    assert Image.open(picture).size[0] > 100
    generate(tmp_path, **{**small, "train": 3})
    assert len(load(paths["train"])["images"]) == 3
    assert load(tmp_path / "done.json")["version"] == VERSION
