"""Check a data set and write its manifest.

python jobs/prepare.py --source annotations/instances_train2017.json --output prepared/train
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from ray_det import cli
from ray_det.config import CLASSES, RENAME, SOURCES, ClassName, MaxBytes, MaxPixels, Section, WorkersConfig
from ray_det.data import paths
from ray_det.data.classes import Selection
from ray_det.data.headers import Header, HeaderChunk
from ray_det.data.manifest import write_manifest
from ray_det.data.pack import pack
from ray_det.data.prepare import make, refuse_errors, write_report
from ray_det.types import DEFAULT_LIMITS, ImageLimits


class PrepareConfig(Section):
    source: str = Field(description=f"{SOURCES} to check and prepare, path or URI")
    split: Literal["train", "val", "test"] = Field(default="train", description="the entry of a data.yaml to prepare")
    images: str | None = Field(
        default=None, description="root of every `file_name` (folder or URI); default: found beside the source"
    )
    output: str = Field(description="folder or URI that gets manifest.parquet and preflight.json")
    classes: tuple[str, ...] = Field(default=(), description=CLASSES)
    rename: dict[str, ClassName] = Field(default={}, description=RENAME)
    max_pixels: MaxPixels = DEFAULT_LIMITS.pixels
    max_bytes: MaxBytes = DEFAULT_LIMITS.bytes
    strict: bool = Field(default=False, description="fail when any error is found, and write no manifest")
    pack: str | None = Field(
        default=None, description="folder or URI that gets all images, copied into a few large files"
    )
    pack_mb: Annotated[int, Field(ge=1)] = Field(default=256, description="size of one of these files, MiB")


def map_chunks(function: Callable[[HeaderChunk], list[Header]], chunks: list[HeaderChunk]) -> list[list[Header]]:
    from ray_det.cluster import start_ray  # Ray takes seconds to import; --help and a wrong JSON should not
    from ray_det.data import ray_map

    return ray_map.map_chunks(function, chunks, connect=partial(start_ray, WorkersConfig()))


def main() -> None:
    config, _ = cli.parse(PrepareConfig, sys.argv[1:], description="Check a data set and write its manifest.")
    output = paths.absolute(config.output)
    manifest_path, report_path = f"{output}/manifest.parquet", f"{output}/preflight.json"
    selection, limits = Selection(config.classes, config.rename), ImageLimits(config.max_pixels, config.max_bytes)
    manifest, report = make(
        config.source, config.images, map_chunks, split=config.split, selection=selection, limits=limits
    )
    print(report.table())
    write_report(report, report_path)
    if config.strict:
        refuse_errors(report, report_path)
    if config.pack:
        manifest = pack(manifest, config.pack, config.pack_mb << 20)
        packed = manifest.table["shard"].drop_null()
        print(f"packed {len(packed)} images into {len(packed.unique())} files under {manifest.shards}")
    write_manifest(manifest, manifest_path)  # last: it names no shard that is not whole
    print(f"wrote {manifest_path} and {report_path}")


if __name__ == "__main__":
    cli.main(main)
