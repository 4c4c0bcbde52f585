"""Detections of a trained model on a folder of images.

python jobs/predict.py --checkpoint runs/cells --input photos/ --output predicted/
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from pydantic import Field

from ray_det import cli
from ray_det.config import Section, WorkersConfig


class PredictConfig(Section):
    checkpoint: str = Field(description="run folder (its best checkpoint) or checkpoint, path or URI")
    input: str = Field(description="folder, glob, file or URI of images")
    output: str = Field(description="folder or URI that gets detections.json (COCO results) and detections.parquet")
    ids_from: str | None = Field(default=None, description="COCO JSON whose image ids to use; default: 1, 2, … by name")
    min_score: Annotated[float, Field(ge=0, le=1)] = Field(default=0.0, description="lowest score that is written")
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="images per forward pass; default: as in training"
    )
    on_bad_image: Literal["fail", "skip"] | None = Field(
        default=None, description="what an image that cannot be decoded does; default: as in training"
    )
    workers: WorkersConfig = WorkersConfig()


def main() -> None:
    config, _ = cli.parse(PredictConfig, sys.argv[1:], description=__doc__ or "")
    from ray_det.predict.images import image_manifest
    from ray_det.predict.launch import DETECTIONS, InferJob, infer_on_workers
    from ray_det.predict.predictor import open_checkpoint
    from ray_det.storage import Folder

    checkpoint = open_checkpoint(config.checkpoint)
    manifest = image_manifest(config.input, checkpoint.classes, config.ids_from, checkpoint.config.data.limits)
    output, location = Folder.at(config.output), Folder.at(config.checkpoint).uri
    job = InferJob(location, manifest, output, config.batch_size, config.min_score, config.on_bad_image)
    for why in infer_on_workers(job, config.workers):
        print(f"skipped, without detections: {why}")
    unread = manifest.table.filter(manifest.table["readable"].to_numpy() == 0)["uri"].to_pylist()
    for name in unread:
        print(f"not readable, left out: {name}")
    print(f"{len(manifest) - len(unread)} images: {output.uri}/{DETECTIONS}")


if __name__ == "__main__":
    cli.main(main)
