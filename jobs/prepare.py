"""Check a COCO data set and write its manifest.

python jobs/prepare.py --source annotations/instances_train2017.json --output prepared/train
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import Field

from ray_det import cli
from ray_det.config import MaxBytes, MaxPixels, Section, WorkersConfig
from ray_det.data.headers import Header, HeaderChunk
from ray_det.data.manifest import write_manifest
from ray_det.data.prepare import make, refuse_errors, write_report
from ray_det.types import DEFAULT_LIMITS, ImageLimits


class PrepareConfig(Section):
    source: str = Field(description="COCO JSON to check and prepare, path or URI")
    images: str | None = Field(
        default=None, description="root of every `file_name` (folder or URI); default: beside the JSON"
    )
    output: str = Field(description="folder that gets manifest.parquet and preflight.json")
    max_pixels: MaxPixels = DEFAULT_LIMITS.pixels
    max_bytes: MaxBytes = DEFAULT_LIMITS.bytes
    strict: bool = Field(default=False, description="fail when any error is found, and write no manifest")


def map_chunks(function: Callable[[HeaderChunk], list[Header]], chunks: list[HeaderChunk]) -> list[list[Header]]:
    from ray_det.cluster import start_ray  # Ray takes seconds to import; --help and a wrong JSON should not
    from ray_det.data import pipeline

    return pipeline.map_chunks(function, chunks, connect=partial(start_ray, WorkersConfig()))


def main() -> None:
    config, _ = cli.parse(PrepareConfig, sys.argv[1:], description="Check a COCO data set and write its manifest.")
    output = Path(config.output)
    manifest, report = make(config.source, config.images, map_chunks, ImageLimits(config.max_pixels, config.max_bytes))
    print(report.table())
    write_report(report, output / "preflight.json")
    if config.strict:
        refuse_errors(report, output / "preflight.json")
    write_manifest(manifest, output / "manifest.parquet")
    print(f"wrote {output / 'manifest.parquet'} and {output / 'preflight.json'}")


if __name__ == "__main__":
    cli.main(main)
