"""Pascal VOC folders: the boxes of the same data set as COCO, the devkit's conventions, and broken files by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
from pyarrow import fs

from ray_det.data import files
from ray_det.data.prepare import make, prepare, same_classes
from ray_det.data.voc import read
from ray_det.types import UserError

NAMES = {1: "disc", 3: "box", 7: "triangle"}


def thing(name: str, corners: tuple[Any, ...], more: str = "") -> str:
    inside = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{escape(name)}</name>{more}<bndbox>{inside}</bndbox></object>"


def annotation(*things: str, file_name: str = "a.jpg", size: tuple[Any, Any] = (48, 64)) -> str:
    return (
        f"<annotation><folder>x</folder><filename>{file_name}</filename><size><width>{size[1]}</width>"
        f"<height>{size[0]}</height><depth>3</depth></size>{''.join(things)}</annotation>"
    )


def write(folder: Path, **pictures: str) -> Path:
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    for stem, text in pictures.items():
        (folder / "Annotations" / f"{stem}.xml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def voc(small_coco: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set as one VOC folder, with a list for every split; crowds are difficult."""
    folder = tmp_path_factory.mktemp("voc")
    shutil.copytree(small_coco["train"].parent / "images", folder / "JPEGImages")
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for split, path in small_coco.items():
        document = json.loads(path.read_text())
        stems = []
        for image in document["images"]:
            things = []
            for a in document["annotations"]:
                if a["image_id"] == image["id"]:
                    x, y, w, h = a["bbox"]
                    difficult = f"<difficult>{a['iscrowd']}</difficult>"
                    things.append(thing(NAMES[a["category_id"]], (x + 1, y + 1, x + w, y + h), difficult))
            stems.append(Path(image["file_name"]).stem)
            size = (image["height"], image["width"])
            write(folder, **{stems[-1]: annotation(*things, file_name=image["file_name"], size=size)})
        lines = "\n".join(reversed(stems)) + "\n"
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
def test_same_boxes_as_the_coco_json(voc: Path, small_coco: dict[str, Path], split: str) -> None:
    ours, report = make(str(voc / "ImageSets" / "Main" / f"{split}.txt"), None)
    theirs, _ = make(str(small_coco[split]), None)
    assert {kind for kind, n in report.counts.items() if n} <= {"crowd", "image_without_boxes"}
    assert ours.root == f"{voc}/JPEGImages"
    assert sorted(ours.classes.names) == sorted(theirs.classes.names)
    for a, b in zip(ours.table.to_pylist(), theirs.table.to_pylist(), strict=True):
        for key in ("uri", "image_id", "height", "width", "boxes", "iscrowd", "box_ok", "trainable"):
            assert a[key] == b[key], key
        assert [ours.classes.names[i] for i in a["labels"]] == [theirs.classes.names[i] for i in b["labels"]]
    assert sum(map(len, ours.table["boxes"].to_pylist())) > 10


def test_a_store_is_read_as_a_folder_is(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = make(str(voc / "ImageSets/Main/val.txt"), None)
    store = fs.SubTreeFileSystem(str(voc.parent), fs.LocalFileSystem())
    monkeypatch.setattr(files, "_filesystem", lambda scheme, host: (store, host))
    manifest, _ = make(f"store://{voc.name}/ImageSets/Main/val.txt", None)
    assert manifest.hash == expected.hash and manifest.root == expected.root.replace(f"{voc.parent}/", "store://")


def test_splits_of_one_folder_agree_on_their_classes(voc: Path, tmp_path: Path) -> None:
    whole, train = (prepare(str(path), None, tmp_path)[0] for path in (voc, voc / "ImageSets" / "Main" / "train.txt"))
    same_classes(train, whole)
    assert len(whole) == 16 + 7 + 5


def test_pixels_count_from_one_and_difficult_is_a_crowd(tmp_path: Path) -> None:
    head = "<part><name>head</name><bndbox><xmin>5</xmin></bndbox></part>"
    text = annotation(
        thing("dog", (1, 1, 64, 48), "<difficult>1</difficult>"), thing("cat", ("3.5", 2, "3.5", 9), head)
    )
    data, _ = read(str(write(tmp_path, b=text, a=annotation(file_name="old name.PNG", size=(0, 0)))))
    assert data.classes.names == ("cat", "dog") and data.classes.category_ids == (1, 2)
    assert data.file_names == ["a.PNG", "b.jpg"]
    np.testing.assert_array_equal(data.declared_I2, [[-1, -1], [48, 64]])
    np.testing.assert_array_equal(data.boxes_M4, [[0, 0, 64, 48], [2.5, 1, 1, 8]])
    np.testing.assert_array_equal(data.crowd_M, [True, False])
    np.testing.assert_array_equal(data.category_of_M, [2, 1])
    np.testing.assert_array_equal(data.image_of_M, [2, 2])


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;">]><annotation><filename>&c;</filename></annotation>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (annotation(thing("cat", (1, 1, "x", 2))), "bad.xml: object 1 (cat): bndbox/xmax is 'x', not a number"),
        (annotation(thing("cat", (1, 1, 2, 2)), "<object><name>dog</name></object>"),
         "bad.xml: object 2 (dog) has no bndbox/xmin"),
        (annotation(thing(" ", (1, 1, 2, 2))), "bad.xml: object 1 has no name"),
        (annotation(size=(48, "wide")), "bad.xml: size/width is 'wide', not a number"),
        ("<annotation>", "bad.xml cannot be read as XML: no element found"),
        ("", "bad.xml cannot be read as XML: no element found"),
        ('<?xml version="1.0" encoding="none"?><a/>', "bad.xml cannot be read as XML: unknown encoding"),
        (BOMB, "bad.xml cannot be read as XML: a document type declaration is refused"),
    ],
)  # fmt: skip
def test_broken_file_is_named_with_object_and_value(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, good=annotation(thing("cat", (1, 1, 2, 2))), bad=text)
    with pytest.raises(UserError) as caught:
        read(str(tmp_path))
    assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\n\nb\n", r"train\.txt line 3: there is no .*Annotations/b\.xml"),
        ("a\na\n", r"train\.txt line 2: 'a' is listed twice"),
        ("a -1\n", r"train\.txt line 1: 'a -1' is not one name"),
        ("\n", "train.txt: empty dataset"),
        ("\xff\n", "train.txt is not UTF-8 text"),
    ],
)
def test_broken_list_is_named_with_its_line(tmp_path: Path, lines: str, message: str) -> None:
    path = write(tmp_path, a=annotation(thing("cat", (1, 1, 2, 2)))) / "train.txt"
    path.write_text(lines, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        read(str(path))


def test_folder_without_annotations_is_said(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"train\.txt is no list of a VOC folder"):
        make(str(tmp_path / "train.txt"), None)
    write(tmp_path)
    with pytest.raises(UserError, match="there is no XML file in"):
        make(str(tmp_path), None)
    write(tmp_path, a=annotation())
    with pytest.raises(UserError, match="has no categories"):
        make(str(tmp_path), None)
    write(tmp_path, a=annotation(thing("cat", (1, 1, 2, 2))))
    with pytest.raises(UserError, match=r"none of the images .*a\.jpg.*JPEGImages"):
        make(str(tmp_path), None)
