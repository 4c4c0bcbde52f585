"""A trained model for other programs: ONNX, safetensors, a model card, and whether they answer as the checkpoint does.

python jobs/export.py --checkpoint runs/cells --output exported/ --data.val val.json
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from ray_det import cli
from ray_det.config import SOURCES, Section
from ray_det.data.classes import Selection
from ray_det.data.prepare import is_manifest, prepare, same_categories
from ray_det.section import PositiveInt
from ray_det.types import UserError


class ExportDataConfig(Section):
    val: str | None = Field(default=None, description=f"{SOURCES} or manifest to compare on, in AP too")
    split: Literal["train", "val", "test"] = Field(default="val", description="the entry of a data.yaml")
    images: str | None = Field(default=None, description="root of every `file_name`; default: found beside the source")


class ExportConfig(Section):
    checkpoint: str = Field(description="run folder (its best checkpoint) or checkpoint, path or URI")
    output: str = Field(description="folder or URI that gets model.onnx, pretrained/, parity.json and README.md")
    canvas: tuple[PositiveInt, ...] | None = Field(
        default=None, description="height,width of the only canvas that the ONNX file takes, pixels; default: any"
    )
    data: ExportDataConfig = ExportDataConfig()
    images: str | None = Field(default=None, description="images to compare on, as --input of jobs/predict.py")
    compare_images: PositiveInt = Field(default=200, description="of these, so many at most")


def main() -> None:
    config, _ = cli.parse(ExportConfig, sys.argv[1:], description=__doc__ or "")
    if config.canvas is not None and len(config.canvas) != 2:
        raise UserError(f"--canvas: expected height,width, got {config.canvas}")
    from ray_det.export.job import ExportJob, export
    from ray_det.predict.parquet_inputs import read_inputs
    from ray_det.predict.predictor import open_checkpoint
    from ray_det.storage import Folder

    checkpoint, output, manifest = open_checkpoint(config.checkpoint), Folder.at(config.output), None
    if config.data.val is not None:
        trained, cache = checkpoint.config.data, Path.home() / ".cache" / "ray_det" / "manifests"
        chosen = Selection() if is_manifest(config.data.val) else Selection(trained.classes, trained.rename)
        source, images = config.data.val, config.data.images
        split, limits = config.data.split, trained.limits
        manifest, _ = prepare(source, images, cache, split=split, selection=chosen, limits=limits)
        same_categories(checkpoint.classes, config.checkpoint, manifest.classes, source)
    inputs = None if config.images is None else read_inputs(config.images, None, None, output.uri)
    command = shlex.join(["python", "jobs/export.py", *sys.argv[1:]])
    canvas = None if config.canvas is None else (config.canvas[0], config.canvas[1])
    parity = export(ExportJob(config.checkpoint, output, canvas, config.compare_images, command, manifest, inputs))
    if parity is None:
        print("not compared with the checkpoint: give --data.val or --images")
    else:
        print(f"{parity.agreeing} of {parity.detections} detections on {parity.images} images agree")
        if parity.ap_checkpoint is not None:
            print(f"AP: checkpoint {parity.ap_checkpoint:.4f}, ONNX {parity.ap_onnx:.4f}")
    print(f"{output.uri}: model.onnx, pretrained/, README.md")


if __name__ == "__main__":
    cli.main(main)
