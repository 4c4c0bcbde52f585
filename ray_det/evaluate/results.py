"""Detections of many images in columns: what ranks send to each other, and what is scored and written.

Shape legend: I images, N detections of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_det import boxes as box_ops
from ray_det.types import ClassList, Detections


@dataclass(frozen=True)
class Results:
    """COCO's results format in columns, each image's detections in the order of its `Detections`."""

    image_ids_I: np.ndarray  # int64, the images that were looked at, also where nothing was found
    image_of_N: np.ndarray  # int64 image ids
    boxes_N4: np.ndarray  # float32 xywh in pixels of the stored image
    scores_N: np.ndarray  # float32
    labels_N: np.ndarray  # int32 contiguous labels

    @classmethod
    def of(cls, detections: Sequence[Detections]) -> Results:
        image_ids = np.array([d.image_id for d in detections], np.int64)
        boxes = np.concatenate([np.empty((0, 4), np.float32), *(d.boxes_N4 for d in detections)])
        return cls(
            image_ids,
            np.repeat(image_ids, [len(d.scores_N) for d in detections]),
            box_ops.xyxy_to_xywh(boxes),
            np.concatenate([np.empty(0, np.float32), *(d.scores_N for d in detections)]),
            np.concatenate([np.empty(0, np.int64), *(d.labels_N for d in detections)]).astype(np.int32),
        )

    @classmethod
    def joined(cls, parts: Sequence[Results]) -> Results:
        """One after the other; at least one."""
        return cls(*(np.concatenate(columns) for columns in zip(*map(_columns, parts), strict=True)))

    def take(self, rows: np.ndarray) -> Results:
        """The detections at these positions, of the same images."""
        return Results(self.image_ids_I, *(column[rows] for column in _columns(self)[1:]))

    def to_coco(self, classes: ClassList) -> list[dict[str, Any]]:
        """COCO's results format, for JSON and for its own tools."""
        category_ids = np.array(classes.category_ids, np.int64)[self.labels_N]
        columns = (self.image_of_N, category_ids, self.boxes_N4, self.scores_N)
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for image_id, category_id, box, score in zip(*(column.tolist() for column in columns), strict=True)
        ]


def _columns(results: Results) -> tuple[np.ndarray, ...]:
    return tuple(vars(results).values())
