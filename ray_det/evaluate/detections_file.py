"""Detections as a Parquet table, in the order of the images, and back to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_det.data.manifest import Manifest, flat
from ray_det.evaluate.results import Results
from ray_det.evaluate.split import readable_rows
from ray_det.types import ClassList

FILE = "detections.parquet"


def in_order_of_images(results: Results, manifest: Manifest) -> Results:
    """Image by image as the manifest has them."""
    return results.take(np.argsort(_rows_of(results, manifest), kind="stable"))


def write_detections(path: Path, results: Results, manifest: Manifest) -> None:
    """The columns of `detections_table`.

    Raises:
        OSError: the file cannot be written.
    """
    names_N = manifest.table["uri"].take(pa.array(_rows_of(results, manifest)))
    pq.write_table(detections_table(results, names_N, manifest.classes), path)


def detections_table(results: Results, names_N: pa.Array | pa.ChunkedArray, classes: ClassList) -> pa.Table:
    """COCO results, with the names of files and classes: bbox is xywh in pixels of the stored image."""
    return pa.table(
        {
            "image_id": pa.array(results.image_of_N),
            "file_name": names_N,
            "category_id": pa.array(np.array(classes.category_ids, np.int64)[results.labels_N]),
            "class": pa.array(classes.names, pa.string()).take(pa.array(results.labels_N)),
            "score": pa.array(results.scores_N),
            "bbox": pa.FixedSizeListArray.from_arrays(pa.array(results.boxes_N4.ravel()), 4),
        }
    )


def read_detections(path: Path, manifest: Manifest) -> Results:
    """What `write_detections` wrote of all readable images of this manifest."""
    table = pq.read_table(path)
    return Results(
        manifest.table["image_id"].to_numpy()[readable_rows(manifest)],
        table["image_id"].to_numpy(),
        flat(table, "bbox").to_numpy().reshape(-1, 4),
        table["score"].to_numpy(),
        np.searchsorted(manifest.classes.category_ids, table["category_id"].to_numpy()).astype(np.int32),
    )


def _rows_of(results: Results, manifest: Manifest) -> np.ndarray:
    """(N,) the manifest's row of each detection's image."""
    image_ids = manifest.table["image_id"].to_numpy()
    by_id = np.argsort(image_ids)
    return by_id[np.searchsorted(image_ids, results.image_of_N, sorter=by_id)]
