"""An image of a batch with what is there and what was found, for people to look at."""

from __future__ import annotations

import numpy as np

from ray_det.report.pictures import Picture
from ray_det.types import Detections, MicroBatch


def picture_of(batch: MicroBatch, i: int, found: Detections) -> Picture:
    """Image `i` at the size that it has in the batch, which must be one of evaluation."""
    height, width = map(int, batch.sizes_B2[i])
    scale = np.array([width / batch.orig_sizes_B2[i, 1], height / batch.orig_sizes_B2[i, 0]] * 2, np.float32)
    return Picture(
        image_id=found.image_id,
        pixels_HW3=batch.pixels_BHW3[i, :height, :width].copy(),
        true_boxes_N4=batch.boxes_N4[i],
        true_labels_N=batch.labels_N[i],
        boxes_N4=found.boxes_N4 * scale,
        scores_N=found.scores_N,
        labels_N=found.labels_N,
    )
