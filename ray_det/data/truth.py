"""The ground truth of a manifest, as evaluation reads it: columns, and COCO's own dictionaries made of them.

Shape legend: M annotations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from ray_det.data.manifest import Manifest, flat


class Annotations(NamedTuple):
    """Annotations in columns. Defects, crowds and those of images that cannot be read are among them."""

    ids_M: np.ndarray  # int64, not always different
    image_ids_M: np.ndarray  # int64
    labels_M: np.ndarray  # int64 contiguous labels
    boxes_M4: np.ndarray  # float64 xywh in pixels, as given
    area_M: np.ndarray  # float64 square pixels, as given
    crowd_M: np.ndarray  # int64, 0 or 1

    def take(self, rows: np.ndarray) -> Annotations:
        """The annotations at these positions, or where this mask is true."""
        return Annotations(*(column[rows] for column in self))


def annotations_of(manifest: Manifest) -> Annotations:
    """All annotations of known images and categories (COCO's own tools ignore others), in the order of the JSON."""
    table = manifest.table
    lengths = pc.call_function("list_value_length", [table["annotation_ids"].combine_chunks()]).to_numpy()
    columns = Annotations(
        flat(table, "annotation_ids").to_numpy(),
        np.repeat(table["image_id"].to_numpy(), lengths),
        flat(table, "labels").to_numpy().astype(np.int64),
        flat(table, "boxes").flatten().to_numpy().reshape(-1, 4),
        flat(table, "area").to_numpy(),
        flat(table, "iscrowd").to_numpy().astype(np.int64),
    )
    # In the order of the JSON: where an annotation id stands twice, pycocotools takes the last.
    return columns.take(np.argsort(flat(table, "positions").to_numpy(), kind="stable"))


def ground_truth(manifest: Manifest) -> dict[str, Any]:
    """The data set as COCO's own tools want it: they give the same numbers on this and on the JSON."""
    ids, image_ids, labels, boxes, area, crowd = annotations_of(manifest)
    columns = {
        "id": ids,
        "image_id": image_ids,
        "category_id": np.array(manifest.classes.category_ids)[labels],
        "bbox": boxes,
        "area": area,
        "iscrowd": crowd,
    }
    records = zip(*(column.tolist() for column in columns.values()), strict=True)
    images = manifest.table.select(["image_id", "uri", "height", "width"])
    return {
        "images": images.rename_columns(["id", "file_name", "height", "width"]).to_pylist(),
        "annotations": [dict(zip(columns, record, strict=True)) for record in records],
        "categories": manifest.classes.to_json(),
    }
