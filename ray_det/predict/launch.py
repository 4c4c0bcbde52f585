"""A checkpoint over a data set on Ray's train workers, gathered to be scored: what `jobs/eval.py` runs."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist
from ray.train import RunConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from ray_det.cluster import Room, require_room, scaling, start_ray
from ray_det.config import WorkersConfig
from ray_det.data.manifest import Manifest
from ray_det.data.pipeline import Loaders, warm_up
from ray_det.evaluate.detections_file import FILE as COLUMNS
from ray_det.evaluate.detections_file import in_order_of_images, read_detections, write_detections
from ray_det.evaluate.gather import gather_lists, require_each_once
from ray_det.evaluate.inference import infer
from ray_det.evaluate.results import Results
from ray_det.evaluate.split import evaluation_shard, readable_rows
from ray_det.models.compute import set_up_torch, use_bf16
from ray_det.predict.output import COCO
from ray_det.predict.predictor import open_checkpoint
from ray_det.storage import Folder
from ray_det.train.skipped import LIST, Skipped, skipped_in
from ray_det.train.torch_trainer import TorchTrainer
from ray_det.types import ClassList, Detections, TrainingError, UserError, unwrapped


@dataclass(frozen=True)
class InferJob:
    """What every worker gets."""

    checkpoint: str
    manifest: Manifest
    output: Folder
    batch_size: int | None  # None: as in the training of the checkpoint
    on_bad_image: str | None = None  # None: as in the training of the checkpoint


def infer_on_workers(job: InferJob, workers: WorkersConfig) -> list[str]:
    """Predict every readable image of the manifest once; rank 0 writes detections.json and detections.parquet.

    Returns:
        Why images were skipped, which have no detections; they are listed in skipped_images.jsonl too.

    Raises:
        UserError: no room for the workers, or an image or checkpoint that cannot be read.
        TrainingError: a storage stayed out of reach.
    """
    start_ray(workers)
    room = require_room(workers)
    with tempfile.TemporaryDirectory(prefix="ray_det_") as scratch:
        trainer = TorchTrainer(
            _worker,
            {"job": job, "room": room, "patience_s": workers.storage_timeout_s},
            scaling(workers, room),
            RunConfig(name="infer", storage_path=scratch),
            partial(warm_up, room.loader_cpus),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            for failure in error.worker_failures.values():
                if isinstance(failure, UserError | TrainingError):
                    raise unwrapped(failure) from None
            raise
    return [json.loads(line)["reason"] for line in job.output.read_text(LIST).splitlines()]


def _worker(config: dict[str, Any]) -> None:
    job: InferJob = config["job"]
    room: Room = config["room"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    set_up_torch(room.threads, None, device)
    checkpoint = open_checkpoint(job.checkpoint, config["patience_s"])
    run = checkpoint.config
    data = run.data.model_copy(update={"on_bad_image": job.on_bad_image or run.data.on_bad_image})
    detections: list[Detections] = []
    skipped: list[Skipped] = []
    detector = checkpoint.build(device)
    size = job.batch_size or run.eval.batch_size or cast(int, run.train.micro_batch_size)
    shard = evaluation_shard(
        job.manifest,
        data,
        batch_size=size,
        divisor=detector.size_divisor,
        rank=rank,
        world=world,
        patience_s=config["patience_s"],
    )
    batches = Loaders(room.loader_cpus).stream(shard)
    for inferred in infer(detector, batches, device, bf16=use_bf16(run.train.precision, device)):
        detections += inferred.detections
        skipped += skipped_in([inferred.batch])
    group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if world > 1 else None
    parts, lost = gather_lists([Results.of(detections)], group), gather_lists(skipped, group)
    if parts is not None and lost is not None:
        everything = Results.joined(parts)
        require_each_once(everything, job.manifest.table["image_id"].to_numpy()[readable_rows(job.manifest)])
        _write(job, everything, checkpoint.classes)
        job.output.write_text(LIST, "".join(json.dumps({"image_id": i, "reason": why}) + "\n" for i, why in lost))


def read_results(output: Folder, manifest: Manifest) -> Results:
    """What `infer_on_workers` wrote for this manifest, to the last bit."""
    with tempfile.TemporaryDirectory() as scratch:
        output.download(Path(scratch) / COLUMNS, COLUMNS)
        return read_detections(Path(scratch) / COLUMNS, manifest)


def _write(job: InferJob, results: Results, classes: ClassList) -> None:
    """COCO results and the same as a Parquet table."""
    results = in_order_of_images(results, job.manifest)
    job.output.write_text(COCO, json.dumps(results.to_coco(classes)))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / COLUMNS
        write_detections(path, results, job.manifest)
        job.output.upload(path, path.name)
