"""What a prediction leaves: Parquet parts that appear whole, one of each kind per shard, and COCO's JSON made of them.

predict.json        what it was made of: the same command goes on with it, another one is refused
detections.parquet/ a row per detection
images.parquet/     a row per image, with the reason where it could not be read; its part says that a shard is done
detections.json     COCO results
skipped_images.jsonl, pictures/
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ray_det.ahead import ahead
from ray_det.config import changed_keys
from ray_det.data import files
from ray_det.evaluate import detections_file
from ray_det.retry import reason
from ray_det.storage import Folder, StorageError
from ray_det.train.skipped import LIST
from ray_det.types import UserError

MADE_OF, COCO, PICTURES = "predict.json", "detections.json", "pictures"
DETECTIONS, IMAGES = detections_file.FILE, "images.parquet"
IMAGES_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("height", pa.int32()),  # stored pixels, null where it could not be read
        ("width", pa.int32()),
        ("detections", pa.int32()),
        ("problem", pa.string()),  # why it could not be read
    ]
)
_READERS = 8
_JSON_ROWS = 10_000
_SHOWN = 10


class Totals(NamedTuple):
    """Of all shards."""

    images: int
    unreadable: int
    detections: int
    problems: list[str]  # of the first few images that could not be read


@dataclass(frozen=True)
class Output:
    """A folder, local or remote, for a number of shards."""

    folder: Folder

    def claim(self, made_of: dict[str, Any], overwrite: bool) -> None:
        """Take the folder for a prediction.

        Raises:
            UserError: it holds another one, or other results.
        """
        ours = (COCO, DETECTIONS, IMAGES, LIST, PICTURES)
        if overwrite:
            for name in (*ours, MADE_OF):
                (self.folder / name).delete()
        if self.folder.exists(MADE_OF):
            names = [line.split(":")[0] for line in changed_keys(self.folder.read_json(MADE_OF), made_of)]
            if names:
                raise UserError(
                    f"{self.folder.uri} holds a prediction that differs in {', '.join(names)}: "
                    "give another --output, or --overwrite"
                )
        elif any(self.folder.exists(name) for name in (COCO, DETECTIONS)):
            raise UserError(f"{self.folder.uri} holds other results: give another --output, or --overwrite")
        self.folder.write_text(MADE_OF, json.dumps(made_of, indent=1))

    def done(self) -> set[int]:
        """Numbers of the shards that are written; what a killed writer left is removed."""
        for kind in (DETECTIONS, IMAGES):
            for name in (self.folder / kind).names():
                if name.endswith(".tmp"):
                    (self.folder / kind / name).delete()
        found = (re.fullmatch(r"part-(\d+)\.parquet", name) for name in (self.folder / IMAGES).names())
        return {int(match[1]) for match in found if match}

    def write_shard(self, number: int, detections: pa.Table, images: pa.Table) -> None:
        """Raises StorageError: there is no room, or the storage is out of reach."""
        for kind, table in ((DETECTIONS, detections), (IMAGES, images)):  # the images last: they say that it is done
            with self._writing(f"{kind}/{_part(number)}") as path:
                pq.write_table(table, path)

    def write_picture(self, image_id: int, jpeg: bytes) -> None:
        with self._writing(f"{PICTURES}/{image_id}.jpg") as path:
            path.write_bytes(jpeg)

    def tables(self, kind: str, shards: int) -> Iterator[pa.Table]:
        """The parts of all shards in order, a few at a time in memory."""
        with ThreadPoolExecutor(_READERS) as pool:
            yield from ahead(pool, partial(self._read, kind), range(shards), _READERS)

    def write_coco(self, shards: int) -> None:
        """`detections.json`, in the order of the images."""
        with self._writing(COCO) as path, path.open("w") as file:
            file.write("[")
            between = ""
            for table in self.tables(DETECTIONS, shards):
                for batch in table.to_batches(_JSON_ROWS):
                    file.write(between + _records(batch))
                    between = ", "
            file.write("]")

    def write_skipped(self, shards: int) -> Totals:
        """The list of images that could not be read, and what there is in all."""
        images = unreadable = detections = 0
        problems: list[str] = []
        with self._writing(LIST) as path, path.open("w") as file:
            for table in self.tables(IMAGES, shards):
                images += len(table)
                detections += sum(table["detections"].to_pylist())
                lost = table.filter(table["problem"].is_valid()).to_pylist()
                unreadable += len(lost)
                for row in lost:
                    about = {"image_id": row["image_id"], "file": row["file_name"], "reason": row["problem"]}
                    file.write(json.dumps(about) + "\n")
                problems += [f"{row['file_name']}: {row['problem']}" for row in lost[: _SHOWN - len(problems)]]
        return Totals(images, unreadable, detections, problems)

    def _read(self, kind: str, number: int) -> pa.Table:
        path = f"{self.folder.uri}/{kind}/{_part(number)}"
        return pq.read_table(pa.BufferReader(files.read_bytes(path, patience_s=self.folder.patience_s)))

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        try:
            with files.writing(f"{self.folder.uri}/{name}", self.folder.patience_s) as path:
                yield path
        except OSError as error:
            raise StorageError(f"cannot write {self.folder.uri}/{name}: {reason(error)}") from error


def _part(number: int) -> str:
    return f"part-{number:06}.parquet"


def _records(batch: pa.RecordBatch) -> str:
    """COCO results as JSON, without the brackets around them."""
    boxes = batch["bbox"].flatten().to_numpy().reshape(-1, 4).tolist()
    columns = (batch["image_id"].to_pylist(), batch["category_id"].to_pylist(), boxes, batch["score"].to_pylist())
    records = [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for image_id, category_id, box, score in zip(*columns, strict=True)
    ]
    return json.dumps(records)[1:-1]
