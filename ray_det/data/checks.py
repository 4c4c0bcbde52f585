"""Every check of a COCO file against its image headers, as pure functions from columns to masks.

Shape legend: I images and M annotations in the order of the file, R rows of the manifest, C categories.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, replace

import numpy as np

from ray_det import boxes
from ray_det.data.coco import CocoData
from ray_det.data.headers import Header

TOLERANCE = 1e-3
"""Pixels by which a box may leave its image unreported: sums of rounded decimals do."""


@dataclass(frozen=True)
class Checked:
    """A COCO file with its headers, what became of every record, and who is marked by which check."""

    data: CocoData
    headers: list[Header]  # I of them
    heights_I: np.ndarray  # int64, stored pixels where readable, else declared, 0 where neither is known
    widths_I: np.ndarray
    readable_I: np.ndarray  # bool
    trainable_I: np.ndarray  # bool: readable, and nothing is wrong with the image as a whole
    entries_R: np.ndarray  # int64: the image entry that each row of the manifest is made of
    rows_M: np.ndarray  # int64: the row that an annotation belongs to, -1 where its image id is unknown
    labels_M: np.ndarray  # int64 contiguous label, -1 where its category id is unknown
    usable_M: np.ndarray  # bool: can be a training target, as far as the box alone goes
    image_marks: dict[str, np.ndarray]  # kind -> bool (I,)
    box_marks: dict[str, np.ndarray]  # kind -> bool (M,)
    category_marks: dict[str, np.ndarray]  # kind -> bool (C,)

    def targets(self) -> np.ndarray:
        """bool (M,): what training will see."""
        known_M = (self.rows_M >= 0) & (self.labels_M >= 0)
        entries_M = self.entries_R[np.maximum(self.rows_M, 0)]
        return known_M & self.usable_M & self.trainable_I[entries_M]


def check(data: CocoData, headers: list[Header]) -> Checked:
    readable_I = np.array([h.state == "ok" for h in headers])
    stored_I2 = np.array([(h.height, h.width) for h in headers], np.int64).reshape(-1, 2)
    sizes_I2 = np.where(readable_I[:, None], stored_I2, np.maximum(data.declared_I2, 0))
    entries_R, row_of_I = _rows(data.image_ids_I)
    rows_M = _lookup(data.image_ids_I, row_of_I, data.image_of_M)
    category_ids_C = np.array(data.classes.category_ids, np.int64)
    labels_M = _lookup(category_ids_C, np.arange(len(category_ids_C)), data.category_of_M)
    sizes_M2 = np.where(rows_M[:, None] >= 0, sizes_I2[entries_R[np.maximum(rows_M, 0)]], 0)
    if data.relative:  # of an image whose size nobody knows they stay shares
        boxes_M4 = data.boxes_M4 * np.maximum(np.tile(sizes_M2[:, ::-1], 2), 1)
        data = replace(data, boxes_M4=boxes_M4, area_M=boxes_M4[:, 2] * boxes_M4[:, 3], relative=False)
    box_marks = _box_marks(data, sizes_M2) | {"unknown_image_id": rows_M < 0, "unknown_category_id": labels_M < 0}
    has_boxes_R = np.zeros(len(entries_R), bool)
    has_boxes_R[rows_M[(rows_M >= 0) & (labels_M >= 0)]] = True
    image_marks = _image_marks(data, headers, readable_I, sizes_I2)
    image_marks["image_without_boxes"] = np.isin(np.arange(len(row_of_I)), entries_R[~has_boxes_R])
    wrong_size_I = image_marks["size_mismatch"] | image_marks["size_turned"]
    unusable = ("non_finite_box", "degenerate_box", "box_outside_image", "crowd")
    return Checked(
        data=data,
        headers=headers,
        heights_I=sizes_I2[:, 0],
        widths_I=sizes_I2[:, 1],
        readable_I=readable_I,
        trainable_I=readable_I & ~wrong_size_I & ~_ambiguous(data, row_of_I),
        entries_R=entries_R,
        rows_M=rows_M,
        labels_M=labels_M,
        usable_M=~np.any([box_marks[k] for k in unusable], axis=0),
        image_marks=image_marks,
        box_marks=box_marks,
        category_marks={"duplicate_category_name": _repeated(np.array(data.classes.names, object))},
    )


def _rows(image_ids_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(entries (R,), row of each entry (I,)): one row per image id, where it first stands.

    Of several entries with one id the last is taken, as pycocotools does.
    """
    _, first, inverse_I = np.unique(image_ids_I, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    row_of_I = rank[inverse_I]
    entries_R = np.empty(len(first), np.int64)
    entries_R[row_of_I] = np.arange(len(image_ids_I))  # the last assignment stays
    return entries_R, row_of_I


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[keys == wanted], -1 where there is none."""
    order = np.argsort(keys, kind="stable")
    at = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    return np.where(keys[order[at]] == wanted, values[order[at]], -1)


def _ambiguous(data: CocoData, row_of_I: np.ndarray) -> np.ndarray:
    """bool (I,): several files share this image id, so nobody knows whose the annotations are."""
    files_of_row: dict[int, set[str]] = {}
    for row, name in zip(row_of_I.tolist(), data.file_names, strict=True):
        files_of_row.setdefault(row, set()).add(posixpath.normpath(name))
    return np.array([len(files_of_row[row]) > 1 for row in row_of_I.tolist()])


def _repeated(values: np.ndarray) -> np.ndarray:
    """bool: this value stood before."""
    marks = np.ones(len(values), bool)
    marks[np.unique(values, return_index=True)[1]] = False
    return marks


def _image_marks(
    data: CocoData, headers: list[Header], readable_I: np.ndarray, sizes_I2: np.ndarray
) -> dict[str, np.ndarray]:
    states = np.array([h.state for h in headers])
    orientation_I = np.array([h.orientation for h in headers])
    declared_I2 = data.declared_I2
    mismatch_I = readable_I & np.any((declared_I2 >= 0) & (declared_I2 != sizes_I2), axis=1)
    turned_I = mismatch_I & (orientation_I >= 5) & np.all(declared_I2 == sizes_I2[:, ::-1], axis=1)
    normal = [posixpath.normpath(name) for name in data.file_names]
    again_I = _repeated(data.image_ids_I)
    return {
        "missing_file": states == "missing",
        "unreadable_file": states == "unreadable",
        "size_mismatch": mismatch_I & ~turned_I,
        "size_turned": turned_I,
        "exif_orientation": readable_I & (orientation_I != 1),
        "mode_not_rgb": np.array([h.state == "ok" and h.mode != "RGB" for h in headers]),
        "several_frames": np.array([h.several for h in headers]),
        "duplicate_image_id": again_I,
        # the same entry twice is one finding, not two
        "duplicate_file_name": _repeated(np.array(normal, object)) & ~again_I,
    }


def _box_marks(data: CocoData, sizes_M2: np.ndarray) -> dict[str, np.ndarray]:
    finite_M = np.all(np.isfinite(data.boxes_M4), axis=1)
    with np.errstate(over="ignore"):
        corners_M4 = boxes.xywh_to_xyxy(np.where(finite_M[:, None], data.boxes_M4, 0))
    inside_M4 = np.clip(corners_M4, 0, np.tile(sizes_M2[:, ::-1], 2).astype(np.float64))
    positive_M, left_M = _positive(corners_M4), _positive(inside_M4)
    # Boxes become float32 in the loader: what has no width there has none.
    vanishing_M = left_M & ~_positive(inside_M4.astype(np.float32))
    off_M = np.abs(inside_M4 - corners_M4).max(axis=1, initial=0) > TOLERANCE
    known_M = np.all(sizes_M2 > 0, axis=1)
    return {
        "non_finite_box": ~finite_M,
        "non_finite_area": finite_M & ~np.isfinite(data.area_M),
        "degenerate_box": finite_M & (~positive_M | vanishing_M),
        "box_outside_image": known_M & positive_M & ~left_M,
        "box_partly_outside": known_M & positive_M & left_M & off_M,
        "duplicate_annotation_id": _repeated(data.annotation_ids_M),
        "crowd": data.crowd_M,
        "annotation_id_zero": data.annotation_ids_M == 0,
    }


def _positive(corners_N4: np.ndarray) -> np.ndarray:
    """bool (N,): width and height of an xyxy box are above 0."""
    return np.all(corners_N4[:, 2:] > corners_N4[:, :2], axis=1)
