"""Whether an answer over HTTP is what the detector says in this process."""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_det.types import ClassList, Detections


def require_same(image: dict[str, Any], wanted: Detections, classes: ClassList, rtol: float = 0) -> None:
    """To 1e-4, pixels and scores; and `rtol`, where the forward pass was another."""
    found = image["detections"]
    assert len(found) == len(wanted.scores_N) > 0
    boxes = np.array([one["bbox"] for one in found])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(boxes, wanted.boxes_N4, rtol=rtol, atol=1e-4)
    np.testing.assert_allclose([one["score"] for one in found], wanted.scores_N, rtol=0, atol=1e-4)
    assert [one["category_id"] for one in found] == [classes.category_ids[label] for label in wanted.labels_N]
    assert [one["class"] for one in found] == [classes.names[label] for label in wanted.labels_N]
