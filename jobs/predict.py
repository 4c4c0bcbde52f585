"""Detections of a trained model on any number of images. The same command goes on where it was killed.

python jobs/predict.py --checkpoint runs/cells --input photos/ --output predicted/
"""

from __future__ import annotations

import sys
import time
from typing import Annotated, Literal

from pydantic import Field

from ray_det import cli
from ray_det.config import Section, WorkersConfig
from ray_det.section import PositiveInt, Share

EVERYWHERE = WorkersConfig(num="1..10000")


class PredictConfig(Section):
    checkpoint: str = Field(description="run folder (its best checkpoint) or checkpoint, path or URI")
    input: str = Field(
        description="folder, glob, file or URI of images; or Parquet: a manifest, a column of paths (uri, path, "
        "file_name), or one of image files (bytes, image_bytes, image, content)"
    )
    output: str = Field(
        description="folder or URI that gets detections.json (COCO results), detections.parquet and images.parquet"
    )
    ids_from: str | None = Field(default=None, description="COCO JSON whose image ids to use; default: 1, 2, … by name")
    min_score: Share = Field(default=0.0, description="lowest score that is written")
    batch_size: PositiveInt | None = Field(default=None, description="images per forward pass; default: as in training")
    on_bad_image: Literal["fail", "skip"] = Field(
        default="skip",
        description="what an image that cannot be read does: end the prediction, or get a row that says why",
    )
    pictures: Annotated[int, Field(ge=0)] = Field(
        default=0, description="images, evenly over all, that are drawn with their boxes into pictures/"
    )
    shard_images: PositiveInt | None = Field(
        default=None, description="images of a part, which is what is lost at most; default: by their number"
    )
    coco_json: bool | None = Field(default=None, description="write detections.json; default: up to a million images")
    overwrite: bool = Field(default=False, description="delete an earlier prediction in the output and start anew")
    workers: WorkersConfig = EVERYWHERE


def main() -> None:
    config, _ = cli.parse(PredictConfig, sys.argv[1:], description=__doc__ or "")
    from ray_det.predict.job import PredictJob, predict_images
    from ray_det.predict.output import IMAGES
    from ray_det.predict.parquet_inputs import read_inputs
    from ray_det.predict.predictor import open_checkpoint
    from ray_det.storage import Folder

    started = time.monotonic()
    patience_s = config.workers.storage_timeout_s
    open_checkpoint(config.checkpoint, patience_s)  # before the input is listed, which may take long
    output, checkpoint = Folder.at(config.output, patience_s), Folder.at(config.checkpoint).uri
    inputs = read_inputs(config.input, config.ids_from, config.shard_images, output.uri)
    job = PredictJob(
        checkpoint,
        inputs,
        output,
        config.batch_size,
        config.min_score,
        config.on_bad_image == "skip",
        config.pictures,
        config.coco_json,
        config.overwrite,
    )
    totals = predict_images(job, config.workers)
    for problem in totals.problems:
        print(f"not readable, without detections: {problem}")
    if totals.unreadable > len(totals.problems):
        print(f"… and {totals.unreadable - len(totals.problems)} more: {output.uri}/skipped_images.jsonl")
    seconds = time.monotonic() - started
    print(f"{totals.images} images, {totals.detections} detections in {seconds:.0f} s: {output.uri} (see {IMAGES})")


if __name__ == "__main__":
    cli.main(main)
