"""Check a COCO data set and write its manifest.

python jobs/prepare.py --source annotations/instances_train2017.json --output prepared/train
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from ray_det import cli
from ray_det.config import Section
from ray_det.data.headers import Header, HeaderChunk, map_in_threads
from ray_det.data.manifest import write_manifest
from ray_det.data.prepare import make, refuse_errors, write_report

RAY_FROM = 5000
"""Images from which on the headers are read by Ray Data tasks: below, starting Ray takes longer than reading them."""


class PrepareConfig(Section):
    source: str = Field(description="COCO JSON to check and prepare, path or URI")
    images: str | None = Field(None, description="root of every `file_name` (folder or URI); default: beside the JSON")
    output: str = Field(description="folder that gets manifest.parquet and preflight.json")
    strict: bool = Field(False, description="fail when any error is found, and write no manifest")


def map_chunks(function: Callable[[HeaderChunk], list[Header]], chunks: list[HeaderChunk]) -> list[list[Header]]:
    if sum(len(names) for _, names in chunks) <= RAY_FROM:
        return map_in_threads(function, chunks)
    from ray_det.data.pipeline import ray_map_chunks  # Ray takes seconds to import

    return ray_map_chunks(function, chunks)


def main() -> None:
    config, _ = cli.parse(PrepareConfig, sys.argv[1:], description="Check a COCO data set and write its manifest.")
    output = Path(config.output)
    manifest, report = make(config.source, config.images, map_chunks)
    print(report.table())
    write_report(report, output / "preflight.json")
    if config.strict:
        refuse_errors(report, output / "preflight.json")
    write_manifest(manifest, output / "manifest.parquet")
    print(f"wrote {output / 'manifest.parquet'} and {output / 'preflight.json'}")


if __name__ == "__main__":
    cli.main(main)
