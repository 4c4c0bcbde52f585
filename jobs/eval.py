"""COCO metrics of a checkpoint on a data set: the numbers that training gives for the same data.

python jobs/eval.py --checkpoint runs/cells --data.val test.json --output evaluated/
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ray_det import cli
from ray_det.config import CLASSES, RENAME, SCORER, SOURCES, ClassName, DatasetConfig, Scorer, Section, WorkersConfig
from ray_det.data.classes import Selection
from ray_det.data.prepare import is_manifest, prepare, same_categories


class EvalDataConfig(Section):
    val: str = Field(description=f"{SOURCES} or manifest to evaluate on")
    split: Literal["train", "val", "test"] = Field(default="val", description="the entry of a data.yaml")
    images: str | None = Field(default=None, description="root of every `file_name`; default: found beside the source")
    classes: tuple[str, ...] | None = Field(default=None, description=f"{CLASSES}; default: as in training")
    rename: dict[str, ClassName] | None = Field(default=None, description=f"{RENAME}; default: as in training")


class EvalJobConfig(Section):
    checkpoint: str = Field(description="run folder (its best checkpoint) or checkpoint, path or URI")
    data: EvalDataConfig
    output: str = Field(
        description="folder or URI that gets summary.json, report.html, detections.json and detections.parquet"
    )
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="images per forward pass; default: as in training"
    )
    on_bad_image: Literal["fail", "skip"] | None = Field(
        default=None, description="what an image that cannot be decoded does; default: as in training"
    )
    scorer: Scorer | None = Field(default=None, description=f"{SCORER}; default: as in training")
    workers: WorkersConfig = WorkersConfig()


def selection(given: EvalDataConfig, trained: DatasetConfig) -> Selection:
    """The classes that the checkpoint knows, unless others are asked for; a manifest comes with its own."""
    if is_manifest(given.val) and given.classes is None and given.rename is None:
        return Selection()
    classes = trained.classes if given.classes is None else given.classes
    return Selection(classes, trained.rename if given.rename is None else given.rename)


def main() -> None:
    config, _ = cli.parse(EvalJobConfig, sys.argv[1:], description=__doc__ or "")
    from ray_det.evaluate.analysis_files import write_analysis
    from ray_det.evaluate.coco_eval import coco_metrics
    from ray_det.predict.launch import InferJob, infer_on_workers, read_results
    from ray_det.predict.predictor import open_checkpoint
    from ray_det.report.analysis_page import PICTURES, write_evaluation_page
    from ray_det.report.progress import results_table
    from ray_det.storage import Folder

    patience_s = config.workers.storage_timeout_s
    checkpoint = open_checkpoint(config.checkpoint, patience_s)
    cache, limits = Path.home() / ".cache" / "ray_det" / "manifests", checkpoint.config.data.limits
    chosen = selection(config.data, checkpoint.config.data)
    data = config.data
    manifest, report = prepare(data.val, data.images, cache, split=data.split, selection=chosen, limits=limits)
    if report and report.notable:
        print(report.table())
    same_categories(checkpoint.classes, config.checkpoint, manifest.classes, config.data.val)
    output = Folder.at(config.output, patience_s)
    job = InferJob(Folder.at(config.checkpoint).uri, manifest, output, config.batch_size, config.on_bad_image)
    for why in infer_on_workers(job, config.workers):
        print(f"skipped, its boxes count as missed: {why}")
    scorer = config.scorer or checkpoint.config.eval.scorer
    results = read_results(output, manifest)
    metrics = coco_metrics(manifest, results, scorer)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        metrics |= write_analysis(folder, "val", manifest, results, checkpoint.config.data, patience_s)
        summary = {f"val/{name}": value for name, value in metrics.items()}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        write_evaluation_page(folder, f"{config.checkpoint} on {config.data.val}")
        (output / PICTURES).delete()  # of an earlier evaluation
        output.upload(folder)
    print(results_table(summary))
    print(f"{output.uri}/summary.json, report.html")


if __name__ == "__main__":
    cli.main(main)
