"""The preflight: what is wrong with a COCO data set, file by file, before anything is trained on it.

One convention holds in training, evaluation and prediction: boxes and sizes are those of the STORED pixels, and an EXIF
orientation is never applied, as in COCO's own tools. Where a declared size only fits the turned picture, the boxes were
most likely drawn on the turned picture too; the preflight says so ("size_turned") and the image is not trained on.

What cannot be trained on leaves the training targets, counted and listed; evaluation keeps the JSON as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ray_det.data.checks import Checked, check
from ray_det.data.coco import CocoData
from ray_det.data.headers import MapChunks, map_in_threads, scan
from ray_det.data.manifest import Manifest
from ray_det.types import DEFAULT_LIMITS, ImageLimits, UserError

Severity = Literal["error", "warning", "info"]

KINDS: dict[str, tuple[Severity, str]] = {
    "missing_file": ("error", "no such file; not trained on"),
    "unreadable_file": ("error", "no readable image; not trained on"),
    "size_mismatch": ("error", "size is not as declared; not trained on"),
    "size_turned": ("error", "size is declared as EXIF turns the picture; not trained on"),
    "duplicate_image_id": ("error", "image id used again; the last entry counts"),
    "duplicate_annotation_id": ("error", "annotation id used again"),
    "unknown_image_id": ("error", "annotation of an image that is not listed; ignored"),
    "unknown_category_id": ("error", "annotation of a category that is not listed; ignored"),
    "non_finite_box": ("error", "NaN or infinity in a box; not trained on"),
    "degenerate_box": ("error", "box without width or height; not trained on"),
    "box_outside_image": ("error", "box wholly outside of its image; not trained on"),
    "box_partly_outside": ("warning", "box partly outside of its image; clipped in training"),
    "non_finite_area": ("warning", "NaN or infinity as an area"),
    "duplicate_file_name": ("warning", "file listed under several image ids"),
    "duplicate_category_name": ("warning", "name of an earlier category too; two classes, told apart by their ids"),
    "exif_orientation": ("warning", "EXIF orientation, never applied: boxes must fit the stored pixels"),
    "annotation_id_zero": ("info", "annotation id 0: pycocotools takes its match for none"),
    "mode_not_rgb": ("info", "not an RGB image; converted"),
    "several_frames": ("info", "several frames or pages; the first is used"),
    "image_without_boxes": ("info", "image without boxes; kept"),
    "crowd": ("info", "crowd; kept for evaluation, not trained on"),
}
WHERE = "say where they are with --data.images (--images of jobs/prepare.py)"
MAX_LISTED = 1000
"""Findings of one kind that are listed one by one; all are counted."""
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    file: str
    image_id: int | None
    annotation_id: int | None
    value: str

    def __str__(self) -> str:
        owner = "" if self.annotation_id is None else f" annotation {self.annotation_id}"
        return f"{self.file}{owner}: {self.value}"


@dataclass(frozen=True)
class PreflightReport:
    source: str
    root: str
    images: int
    annotations: int
    classes: int
    trainable_images: int
    trainable_boxes: int
    counts: dict[str, int]  # every kind
    findings: dict[str, tuple[Finding, ...]]  # the first ones of every kind that was found

    @property
    def errors(self) -> int:
        return sum(n for kind, n in self.counts.items() if KINDS[kind][0] == "error")

    @property
    def notable(self) -> bool:
        """Whether there is more to read than information."""
        return any(KINDS[kind][0] != "info" for kind, n in self.counts.items() if n)

    def table(self) -> str:
        """Plain text for people: a line per kind that was found, with its first examples."""
        lines = [
            f"{self.source}: {self.images} images under {self.root}, "
            f"{self.annotations} annotations, {self.classes} classes"
        ]
        found = [kind for kind in KINDS if self.counts[kind]]
        width = max((len(kind) for kind in found), default=0)
        for kind in found:
            severity, meaning = KINDS[kind]
            lines.append(f"  {severity:<7}  {kind:<{width}}  {self.counts[kind]:>7}  {meaning}")
            lines += [f"{'':{width + 22}}{finding}" for finding in self.findings[kind][:_SHOWN]]
        if not found:
            lines.append("  nothing to report")
        lines.append(
            f"usable in training: {self.trainable_images} of {self.images} images, "
            f"{self.trainable_boxes} of {self.annotations} annotations; evaluation keeps the JSON as it is"
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        content = {k: v for k, v in asdict(self).items() if k != "findings"}
        listed = {
            kind: {
                "severity": KINDS[kind][0],
                "meaning": KINDS[kind][1],
                "count": self.counts[kind],
                "examples": [asdict(f) for f in self.findings[kind]],
            }
            for kind in KINDS
            if self.counts[kind]
        }
        return content | {"errors": self.errors, "findings": listed}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PreflightReport:
        findings = {k: tuple(Finding(**e) for e in v["examples"]) for k, v in content["findings"].items()}
        own = {k: v for k, v in content.items() if k not in ("errors", "findings")}
        return cls(findings=findings, **own)


def inspect(
    data: CocoData, root: str, map_chunks: MapChunks = map_in_threads, limits: ImageLimits = DEFAULT_LIMITS
) -> tuple[Checked, PreflightReport]:
    """Open the header of every image and run every check.

    Raises:
        UserError: a `file_name` leaves the root, or no image is there at all.
    """
    headers = scan(root, data.file_names, map_chunks, limits)
    if all(header.state == "missing" for header in headers):
        raise UserError(
            f"none of the {len(headers)} images of {data.source} is under {root} "
            f"(for example {data.file_names[0]}); {WHERE}"
        )
    checked = check(data, headers)
    return checked, _report(checked, root)


def _report(checked: Checked, root: str) -> PreflightReport:
    data = checked.data
    marks = checked.image_marks | checked.box_marks | checked.category_marks
    make = dict.fromkeys(checked.image_marks, _image_finding) | dict.fromkeys(checked.box_marks, _box_finding)
    make |= dict.fromkeys(checked.category_marks, _category_finding)
    findings: dict[str, tuple[Finding, ...]] = {}
    for kind in KINDS:
        found = tuple(make[kind](checked, kind, int(i)) for i in np.flatnonzero(marks[kind])[:MAX_LISTED])
        if found:
            findings[kind] = found
    return PreflightReport(
        source=data.source,
        root=root,
        images=len(data.file_names),
        annotations=len(data.annotation_ids_M),
        classes=len(data.classes),
        trainable_images=int(checked.trainable_I[checked.entries_R].sum()),
        trainable_boxes=int(checked.targets().sum()),
        counts={kind: int(marks[kind].sum()) for kind in KINDS},
        findings=findings,
    )


def _image_finding(checked: Checked, kind: str, i: int) -> Finding:
    data, header = checked.data, checked.headers[i]
    stored = f"stored {header.width} x {header.height}"
    declared = f"declared {data.declared_I2[i, 1]} x {data.declared_I2[i, 0]}"
    values: dict[str, Callable[[], str]] = {
        "missing_file": lambda: header.problem,
        "unreadable_file": lambda: header.problem,
        "size_mismatch": lambda: f"{declared}, {stored}",
        "size_turned": lambda: f"{declared}, {stored}, EXIF orientation {header.orientation}",
        "exif_orientation": lambda: str(header.orientation),
        "mode_not_rgb": lambda: header.mode,
        "several_frames": lambda: "first frame",
        "duplicate_file_name": lambda: f"image id {data.image_ids_I[i]}",
        "duplicate_image_id": lambda: f"image id {data.image_ids_I[i]}",
        "image_without_boxes": lambda: "no boxes",
    }
    return Finding(data.file_names[i], int(data.image_ids_I[i]), None, values[kind]())


def _box_finding(checked: Checked, kind: str, m: int) -> Finding:
    data, row = checked.data, int(checked.rows_M[m])
    entry = int(checked.entries_R[row])
    file = data.file_names[entry] if row >= 0 else "(no image)"
    value = "[" + ", ".join(f"{v:.10g}" for v in data.boxes_M4[m]) + "]"
    if kind in ("box_outside_image", "box_partly_outside"):
        value += f" in {checked.widths_I[entry]} x {checked.heights_I[entry]}"
    value = {
        "unknown_image_id": f"image id {data.image_of_M[m]}",
        "unknown_category_id": f"category id {data.category_of_M[m]}",
        "non_finite_area": f"area {data.area_M[m]}",
    }.get(kind, value)
    return Finding(file, int(data.image_of_M[m]), int(data.annotation_ids_M[m]), value)


def _category_finding(checked: Checked, kind: str, c: int) -> Finding:
    names, ids = checked.data.classes.names, checked.data.classes.category_ids
    return Finding(f"category {ids[c]}", None, None, f"{names[c]}, as category {ids[names.index(names[c])]}")


def require_trainable(manifest: Manifest) -> None:
    """Raises:
    UserError: not one box of the data set can be trained on.
    """
    flags = manifest.table.filter(manifest.table["trainable"])["box_ok"].combine_chunks().flatten()
    if not flags.true_count:
        raise UserError(
            f"{manifest.source} has no box to train on: {manifest.counts['trainable_images']} of "
            f"{manifest.counts['images']} images are usable, with no usable box; jobs/prepare.py lists what is wrong"
        )
