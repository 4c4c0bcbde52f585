"""Whether an ONNX file answers as the checkpoint does: on real images, in boxes, scores and AP.

Shape legend: B images, N detections of one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from ray_det.data.manifest import Manifest
from ray_det.evaluate.coco_eval import coco_metrics
from ray_det.evaluate.inference import to_image
from ray_det.evaluate.results import Results
from ray_det.evaluate.split import readable_rows
from ray_det.predict.inputs import InputImage
from ray_det.predict.predictor import Predictor
from ray_det.retry import PATIENCE_S
from ray_det.types import Detections, MicroBatch, UserError

MAX_BOX_PX, MAX_SCORE, MAX_AP = 0.5, 1e-3, 1e-3
"""Bounds: of corners in pixels of the stored image, of scores, and of AP, in 0..1."""
SHOWN_SCORE = 0.05
"""Detections below it are not compared: among them scores are equal to the last bits, and their order is chance."""
AGREED = 0.999
"""Share of detections, of either side, that must have a partner within the bounds."""


class OnnxDetector:
    """An exported file in onnxruntime, on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def detect(self, batch: MicroBatch) -> list[Detections]:
        """Detections in pixels of the stored images."""
        images = np.ascontiguousarray(batch.pixels_BHW3.transpose(0, 3, 1, 2))
        answer: Any = self._session.run(None, {"images": images, "sizes": batch.sizes_B2.astype(np.int64)})
        found = []
        for i, (boxes, scores, labels) in enumerate(zip(*answer, strict=True)):
            there = torch.from_numpy(scores > 0)
            parts = zip(("boxes", "scores", "labels"), (boxes, scores, labels), strict=True)
            prediction: Any = {name: torch.from_numpy(part)[there] for name, part in parts}
            found.append(to_image(prediction, batch, i))
        return found


@dataclass
class Parity:
    """What was compared, and how far it is apart."""

    images: int = 0
    detections: int = 0  # of both sides, from SHOWN_SCORE on
    agreeing: int = 0  # that have a partner of the same class within the bounds
    worst_box_px: float = 0.0  # among partners
    worst_score: float = 0.0
    ap_checkpoint: float | None = None
    ap_onnx: float | None = None

    @property
    def failures(self) -> list[str]:
        """What is not within its bound."""
        failed = []
        if self.agreeing < AGREED * self.detections:
            apart = self.detections - self.agreeing
            failed.append(
                f"{apart} of {self.detections} detections have no partner within {MAX_BOX_PX} px and {MAX_SCORE:g}"
            )
        if self.ap_checkpoint is not None and self.ap_onnx is not None:
            if abs(self.ap_checkpoint - self.ap_onnx) > MAX_AP:
                failed.append(f"AP {self.ap_onnx:.4f} in place of {self.ap_checkpoint:.4f}")
        return failed

    def to_json(self) -> dict[str, Any]:
        bounds = {"box_px": MAX_BOX_PX, "score": MAX_SCORE, "ap": MAX_AP, "share": AGREED, "from_score": SHOWN_SCORE}
        return asdict(self) | {"bounds": bounds, "passed": not self.failures}

    def add(self, ours: Detections, theirs: Detections) -> None:
        """Compare the detections of one image."""
        self.images += 1
        for one, other in ((ours, theirs), (theirs, ours)):
            for box, score, label in zip(one.boxes_N4, one.scores_N, one.labels_N, strict=True):
                if score < SHOWN_SCORE:
                    continue
                self.detections += 1
                self._find(box, score, other, other.labels_N == label)

    def _find(self, box: np.ndarray, score: float, other: Detections, same: np.ndarray) -> None:
        apart_px = np.abs(other.boxes_N4[same] - box).max(axis=1, initial=0)
        apart = np.abs(other.scores_N[same] - score)
        near = np.flatnonzero((apart_px <= MAX_BOX_PX) & (apart <= MAX_SCORE))
        if len(near):
            best = near[np.argmin(apart_px[near] / MAX_BOX_PX + apart[near] / MAX_SCORE)]
            self.agreeing += 1
            self.worst_box_px = max(self.worst_box_px, float(apart_px[best]))
            self.worst_score = max(self.worst_score, float(apart[best]))


def compare(
    predictor: Predictor,
    exported: OnnxDetector,
    images: Iterator[InputImage],
    canvas: tuple[int, int] | None,
    max_bytes: int,
) -> tuple[Parity, list[Detections], list[Detections]]:
    """Both on every image that can be read, one by one, and what each found.

    Args:
        canvas: (h, w) of a file that takes no other; images are put on it for both.
    """
    parity, ours, theirs = Parity(), [], []
    for image in images:
        try:
            batch = predictor.prepare(image.read(max_bytes, PATIENCE_S), image.id)
        except UserError:
            continue
        batch = batch if canvas is None else on_canvas(batch, canvas)
        ((one,),) = predictor.detect([batch])
        (other,) = exported.detect(batch)
        parity.add(one, other)
        ours.append(one)
        theirs.append(other)
    if not parity.images:
        raise UserError("none of the images to compare on can be read")
    return parity, ours, theirs


def with_ap(manifest: Manifest, parity: Parity, ours: list[Detections], theirs: list[Detections]) -> Parity:
    """And the AP of both on the annotated images of a manifest."""
    ap_ours, ap_theirs = (coco_metrics(manifest, Results.of(found))["AP"] for found in (ours, theirs))
    return replace(parity, ap_checkpoint=ap_ours, ap_onnx=ap_theirs)


def on_canvas(batch: MicroBatch, canvas: tuple[int, int]) -> MicroBatch:
    """The batch on a larger canvas; what is added is hidden by the sizes.

    Raises:
        UserError: the canvas is smaller than the images.
    """
    height, width = batch.pixels_BHW3.shape[1:3]
    if height > canvas[0] or width > canvas[1]:
        raise UserError(
            f"--canvas {canvas[0]},{canvas[1]} is too small: the checkpoint needs {height} x {width} for an image"
        )
    pixels = np.zeros((len(batch.pixels_BHW3), *canvas, 3), np.uint8)
    pixels[:, :height, :width] = batch.pixels_BHW3
    return replace(batch, pixels_BHW3=pixels)


def annotated(manifest: Manifest, most: int) -> tuple[Manifest, Iterator[InputImage]]:
    """So many readable images, evenly over all, and a manifest of these alone."""
    rows = readable_rows(manifest)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64))]
    part = replace(manifest, table=manifest.table.take(rows))
    places = zip(part.table["image_id"].to_pylist(), part.places(part.table), strict=True)
    return part, (InputImage(image_id, place.uri, place.read) for image_id, place in places)
