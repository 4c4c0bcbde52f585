"""A Pascal VOC folder as the columns of a COCO file: Annotations/, JPEGImages/ and lists of names under ImageSets/.

* Pixels count from 1 and a box includes both of its ends: xmin 1, xmax 3 is x 0, width 3.
* `difficult` becomes `iscrowd`, as near as COCO's metrics come to the devkit: not an object to find, and finding it is
  no mistake. As a crowd it is no training target.
* Classes are all the names in Annotations/, sorted, from id 1, so that every list of one folder has the same.

Shape legend: I images, M annotations.
"""

from __future__ import annotations

import posixpath
from typing import NamedTuple, NoReturn
from xml.etree import ElementTree

import numpy as np

from ray_det.data import files, paths
from ray_det.data.coco import CocoData
from ray_det.types import ClassList, UserError

ANNOTATIONS = "Annotations"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    name: str
    corners: tuple[float, ...]  # of `_CORNERS`, from 1, ends included
    difficult: bool


class _Picture(NamedTuple):
    file_name: str  # under JPEGImages/
    size: tuple[int, int]  # declared (h, w), -1 where there is none
    objects: list[_Object]


def read(source: str) -> tuple[CocoData, list[str]]:
    """The images that a list (ImageSets/Main/train.txt) names, or all of a folder, and where they usually are.

    Raises:
        UserError: no annotations, a name without any, or a broken file; named with line or object.
    """
    folder, listed = _listed(source)
    stems = [n.removesuffix(".xml") for n in files.listing(f"{folder}/{ANNOTATIONS}") if n.endswith(".xml")]
    if not stems:
        raise UserError(f"{source}: there is no XML file in {folder}/{ANNOTATIONS}")
    paths = [f"{folder}/{ANNOTATIONS}/{stem}.xml" for stem in stems]
    contents = zip(stems, paths, files.read_all(paths), strict=True)
    pictures = {stem: _picture(stem, content or b"", path) for stem, path, content in contents}
    for stem, line in listed.items():
        if stem not in pictures:
            raise UserError(f"{source} line {line}: there is no {folder}/{ANNOTATIONS}/{stem}.xml")
    names = sorted({thing.name for picture in pictures.values() for thing in picture.objects})
    if not names:
        raise UserError(f"{source} has no categories: there is no object in {folder}/{ANNOTATIONS}")
    chosen = [pictures[stem] for stem in sorted(listed or pictures)]
    roots = [f"{folder}/JPEGImages", f"{folder}/images", folder]
    return _columns(chosen, ClassList(tuple(names), tuple(range(1, len(names) + 1))), source), roots


def _listed(source: str) -> tuple[str, dict[str, int]]:
    """(folder of Annotations/, line by name); no names where the source is the folder itself."""
    path = paths.absolute(source)
    if not path.endswith(".txt"):
        return path, {}
    lines: dict[str, int] = {}
    for number, line in enumerate(files.read_text(path).splitlines(), start=1):
        words = line.split()
        if len(words) > 1 or (words and words[0] in lines):
            problem = "is listed twice" if len(words) == 1 else "is not one name (lists of a single class have two)"
            raise UserError(f"{source} line {number}: {line.strip()!r} {problem}")
        lines |= {word: number for word in words}
    if not lines:
        raise UserError(f"{source}: empty dataset, it lists no images")
    folder = path
    for _ in range(3):  # ImageSets/Main/train.txt, ImageSets/train.txt, train.txt
        folder = paths.parent(folder)
        if files.is_folder(f"{folder}/{ANNOTATIONS}"):
            return folder, lines
    raise UserError(f"{source} is no list of a VOC folder: there is no {ANNOTATIONS}/ beside it or above it")


class _NoDoctype(ElementTree.TreeBuilder):
    """Entities, which can make a small file fill the memory, need a document type declaration."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise ValueError("a document type declaration is refused")


def _picture(stem: str, content: bytes, path: str) -> _Picture:
    try:
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise UserError(f"{path} cannot be read as XML: {error}") from error
    # The annotation's own name is the image's, as in the devkit; `filename` may be older, but knows the kind of file.
    suffix = posixpath.splitext(root.findtext("filename", "").strip())[1] or ".jpg"
    height, width = (_number(root, f"size/{side}", path, missing="-1") for side in ("height", "width"))
    size = (int(height), int(width)) if 0 < min(height, width) <= max(height, width) < 2**31 else (-1, -1)
    objects = [_object(node, f"{path}: object {i}") for i, node in enumerate(root.findall("object"), start=1)]
    return _Picture(stem + suffix, size, objects)


def _object(node: ElementTree.Element, where: str) -> _Object:
    name = node.findtext("name", "").strip()
    if not name:
        raise UserError(f"{where} has no name")
    where = f"{where} ({name})"
    corners = tuple(_number(node, f"bndbox/{corner}", where) for corner in _CORNERS)
    return _Object(name, corners, _number(node, "difficult", where, missing="0") != 0)


def _number(node: ElementTree.Element, path: str, where: str, missing: str | None = None) -> float:
    text = node.findtext(path) or missing
    if text is None:
        raise UserError(f"{where} has no {path}")
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: {path} is {text!r}, not a number") from None


def _columns(pictures: list[_Picture], classes: ClassList, source: str) -> CocoData:
    things = [thing for picture in pictures for thing in picture.objects]
    id_of = dict(zip(classes.names, classes.category_ids, strict=True))
    corners_M4 = np.array([thing.corners for thing in things], np.float64).reshape(-1, 4)
    boxes_M4 = np.concatenate([corners_M4[:, :2] - 1, corners_M4[:, 2:] - corners_M4[:, :2] + 1], axis=1)
    ids_I = np.arange(1, len(pictures) + 1)
    return CocoData(
        source=source,
        classes=classes,
        image_ids_I=ids_I,
        file_names=[picture.file_name for picture in pictures],
        declared_I2=np.array([picture.size for picture in pictures], np.int64),
        annotation_ids_M=np.arange(1, len(things) + 1),
        image_of_M=np.repeat(ids_I, [len(picture.objects) for picture in pictures]),
        category_of_M=np.array([id_of[thing.name] for thing in things], np.int64),
        boxes_M4=boxes_M4,
        area_M=boxes_M4[:, 2] * boxes_M4[:, 3],
        crowd_M=np.array([thing.difficult for thing in things], bool),
    )
