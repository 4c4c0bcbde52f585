"""YOLO data sets: the boxes of the same data set as COCO, every way to name images, and broken lines by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import fs

from ray_det.config import TrainJobConfig
from ray_det.data import files
from ray_det.data.headers import map_in_threads
from ray_det.data.prepare import make, prepare
from ray_det.data.yolo import read
from ray_det.train.start import begin
from ray_det.types import UserError

LABELS = {1: 0, 3: 1, 7: 2}


@pytest.fixture(scope="module")
def yolo(small_coco: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set as images/<split>/ and labels/<split>/, with six decimals, crowds too."""
    folder = tmp_path_factory.mktemp("yolo")
    for split, path in small_coco.items():
        document = json.loads(path.read_text())
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for image in document["images"]:
            shutil.copy(path.parent / "images" / image["file_name"], folder / "images" / split)
            lines = ""
            for a in document["annotations"]:
                if a["image_id"] == image["id"]:
                    shares = np.array(a["bbox"]) / np.tile([image["width"], image["height"]], 2)
                    shares[:2] += shares[2:] / 2
                    lines += " ".join([str(LABELS[a["category_id"]]), *(f"{v:.6f}" for v in shares)]) + "\n"
            if lines:
                (folder / "labels" / split / image["file_name"]).with_suffix(".txt").write_text(lines)
    names = "names:\n  0: disc\n  1: box\n  2: triangle\n"
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\ntest: images/test\n{names}")
    return folder


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_same_boxes_as_the_coco_json(yolo: Path, small_coco: dict[str, Path], split: str) -> None:
    ours, report = make(str(yolo / "data.yaml"), None, split=split)
    theirs, _ = make(str(small_coco[split]), None)
    assert {kind for kind, n in report.counts.items() if n} <= {"image_without_boxes"}
    assert ours.classes.names == theirs.classes.names and ours.classes.category_ids == (0, 1, 2)
    assert ours.root == str(yolo)
    for a, b in zip(ours.table.to_pylist(), theirs.table.to_pylist(), strict=True):
        assert a["uri"] == f"images/{split}/{b['uri']}"
        for key in ("image_id", "height", "width", "labels", "trainable", "readable"):
            assert a[key] == b[key], key
        boxes = np.reshape(a["boxes"], (-1, 4))
        np.testing.assert_allclose(boxes, np.reshape(b["boxes"], (-1, 4)), atol=1e-3)
        np.testing.assert_allclose(a["area"], boxes[:, 2] * boxes[:, 3])
    assert sum(map(len, ours.table["boxes"].to_pylist())) > 10


def test_a_store_is_read_as_a_folder_is(yolo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = make(str(yolo / "data.yaml"), None, split="val")
    store = fs.SubTreeFileSystem(str(yolo.parent), fs.LocalFileSystem())
    monkeypatch.setattr(files, "_filesystem", lambda scheme, host: (store, host))
    manifest, _ = make(f"store://{yolo.name}/data.yaml", None, split="val")
    assert manifest.hash == expected.hash and manifest.root == expected.root.replace(f"{yolo.parent}/", "store://")


def test_a_run_takes_the_entry_of_each_split(yolo: Path, small_coco: dict[str, Path], tmp_path: Path) -> None:
    data = dict.fromkeys(("train", "val", "test"), str(yolo / "data.yaml"))
    config = TrainJobConfig.model_validate({"storage": str(tmp_path), "data": data | {"strict": True}})
    manifests = begin(config, 0.0, lambda text: None, map_in_threads).manifests
    assert {split: len(manifest) for split, manifest in manifests.items()} == {"train": 16, "val": 7, "test": 5}


def test_boxes_follow_a_changed_picture_and_labels_the_cache(yolo: Path, tmp_path: Path) -> None:
    """Sizes come from the headers: the same shares are other pixels in a larger picture."""
    shutil.copytree(yolo, tmp_path / "y")
    source = str(tmp_path / "y" / "data.yaml")

    def first_box() -> np.ndarray:
        rows = prepare(source, None, tmp_path / "cache", split="val")[0].table["boxes"].to_pylist()
        return np.array(next(boxes for boxes in rows if boxes)[0])

    before = first_box()
    for path in (tmp_path / "y" / "images" / "val").iterdir():
        with Image.open(path) as image:
            larger = image.resize((image.width * 2, image.height * 2))
        larger.save(path)
    np.testing.assert_allclose(first_box(), 2 * before, rtol=1e-12)
    for path in (tmp_path / "y" / "labels" / "val").iterdir():
        path.write_text("0 0.5 0.5 1 1\n")
    assert first_box()[:2].tolist() == [0, 0]


def picture(path: Path, label: str | None = "0 0.5 0.5 0.5 0.25\n") -> None:
    """A picture of 40 x 20 at …/images/…, and its label file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20)).save(path)
    if label is not None:
        text = Path(str(path).replace("/images/", "/labels/")).with_suffix(".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(label)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two folders with a picture each, beside where the data.yaml will be."""
    picture(tmp_path / "d" / "images" / "a" / "x.jpg")
    picture(tmp_path / "d" / "images" / "b" / "deep" / "y.png", None)
    return tmp_path / "d"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("train: images", ["images/a/x.jpg", "images/b/deep/y.png"]),
        ("train: images/a/", ["images/a/x.jpg"]),
        ("train: [images/b, images/a]", ["images/a/x.jpg", "images/b/deep/y.png"]),
        ("train: {d}/images/a", ["images/a/x.jpg"]),
        ("train: ../images/a", ["images/a/x.jpg"]),
        ("path: images\ntrain: a", ["a/x.jpg"]),
        ("path: /nowhere/on/this/machine\ntrain: images/a", ["images/a/x.jpg"]),
        ("train: lists/train.txt", ["images/a/x.jpg", "images/b/deep/y.png"]),
        ("path: lists\ntrain: ../images/b", ["y.png"]),
    ],
)
def test_images_are_named_by_folder_or_list(two: Path, text: str, names: list[str]) -> None:
    (two / "lists").mkdir()
    (two / "lists" / "train.txt").write_text(f"../images/b/deep/y.png\n\n{two}/images/a/x.jpg\n./../images/a/x.jpg\n")
    (two / "data.yaml").write_text(text.replace("{d}", str(two)) + "\nnames: [thing]\n")
    data, (root,) = read(str(two / "data.yaml"), "train")
    assert data.file_names == names
    assert all((Path(root) / name).is_file() for name in names)
    manifest, report = make(str(two / "data.yaml"), None)
    boxes = {"x.jpg": [[10.0, 7.5, 20.0, 5.0]], "y.png": []}  # no label file: an image without boxes
    assert manifest.table["boxes"].to_pylist() == [boxes[name.split("/")[-1]] for name in names]
    assert report.counts["missing_file"] == 0


def test_relative_source_and_uri_are_the_same(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (two / "data.yaml").write_text("train: images\nnames: [thing]\n")
    monkeypatch.chdir(two)
    hashes = {make(name, None)[0].hash for name in ("data.yaml", f"file://{two}/data.yaml", f"{two}/data.yaml")}
    assert len(hashes) == 1


def test_polygons_become_their_boxes_and_rounding_stays_inside(two: Path) -> None:
    label = "\ufeff0 0.1 0.2 0.5 0.3 0.4 0.9\n1 0.5000006 0.5 1.0000012 1\n"
    picture(two / "images" / "a" / "x.jpg", label)
    (two / "data.yaml").write_text("train: images/a\nnames: {0: a, 1: 2024, 5: c}\n")
    manifest, report = make(str(two / "data.yaml"), None)
    assert manifest.classes.to_json() == [{"id": i, "name": n} for i, n in ((0, "a"), (1, "2024"), (5, "c"))]
    np.testing.assert_allclose(manifest.table["boxes"].to_pylist()[0], [[4, 4, 16, 14], [0, 0, 40, 20]], atol=1e-9)
    assert report.counts["box_partly_outside"] == 0


def test_preflight_applies(two: Path) -> None:
    label = "0 0.9 0.5 0.4 0.2\n3 0.5 0.5 0.1 0.1\n0 1.5 0.5 0.4 0.2\n0 nan 0.5 0.4 0.2\n0 0.5 0.5 0 0.2\n"
    picture(two / "images" / "a" / "x.jpg", label)
    (two / "images" / "b" / "deep" / "y.png").write_bytes(b"no image")
    picture(two / "images" / "b" / "z.jpg")
    (two / "data.yaml").write_text("train: images\nnames: [thing]\n")
    manifest, report = make(str(two / "data.yaml"), None)
    found = {"box_partly_outside", "unknown_category_id", "box_outside_image", "non_finite_box", "degenerate_box"}
    assert {kind for kind, n in report.counts.items() if n} == found | {"unreadable_file", "image_without_boxes"}
    assert manifest.counts["trainable_boxes"] == 2
    assert report.findings["box_outside_image"][0].value == "[52, 8, 16, 4] in 40 x 20"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("0 0.5 0.5 0.5 0.5\n\n0 0.5 0.5 0.5\n", r"labels/a/x\.txt line 3 has 4 values; a class and a box are 5"),
        ("cat 0.5 0.5 0.5 0.5\n", r"labels/a/x\.txt line 1: 'cat' is not a number"),
        ("0 0.5 0,5 0.5 0.5\n", r"labels/a/x\.txt line 1: '0,5' is not a number"),
        ("0.5 0.5 0.5 0.5 0.5\n", r"labels/a/x\.txt line 1: class '0\.5' is not a whole number"),
        ("1e300 0.5 0.5 0.5 0.5\n", r"labels/a/x\.txt line 1: class '1e300' is not a whole number"),
        ("-1 0.5 0.5 0.5 0.5\n", r"labels/a/x\.txt line 1: class '-1' is not a whole number from 0"),
    ],
)
def test_broken_line_is_named(two: Path, label: str, message: str) -> None:
    picture(two / "images" / "a" / "x.jpg", label)
    (two / "data.yaml").write_text("train: images\nnames: [thing]\n")
    with pytest.raises(UserError, match=message):
        make(str(two / "data.yaml"), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val: images\nnames: [a]", r"data\.yaml has no 'train' entry"),
        ("train: gone\nnames: [a]", r"data\.yaml: train: there is no folder or list file .*/d/gone"),
        ("train: gone.txt\nnames: [a]", r"data\.yaml: train: there is no folder or list file .*/d/gone\.txt"),
        ("train: lists\nnames: [a]", r"data\.yaml: empty dataset, its 'train' entry has no images"),
        ("train: [images, 3]\nnames: [a]", r"data\.yaml: train: 3 is not a folder or a list file"),
        ("train: images", r"data\.yaml has no classes: 'names' must be a list"),
        ("train: images\nnames: {a: 0}", r"data\.yaml: names: 'a': 0 is not a number from 0 and a name"),
        ("train: [", r"data\.yaml: not valid YAML"),
    ],
)
def test_broken_yaml_is_named(two: Path, text: str, message: str) -> None:
    (two / "lists").mkdir()
    (two / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        make(str(two / "data.yaml"), None)
