"""A checkpoint to files that need none of this package: what `jobs/export.py` runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ray_det.data.manifest import Manifest
from ray_det.export.card import PARITY, interface, model_card
from ray_det.export.onnx_file import graph_of, write_onnx
from ray_det.export.parity import OnnxDetector, Parity, annotated, compare, with_ap
from ray_det.export.pretrained import write_pretrained
from ray_det.predict.inputs import InputImage, Inputs
from ray_det.predict.predictor import Predictor, open_checkpoint
from ray_det.storage import Folder
from ray_det.train.checkpoint import Checkpoint
from ray_det.types import TrainingError, UserError

EXAMPLE_CELLS = (9, 11)
"""Sides of the canvas that a graph for any canvas is traced with, in multiples of the size divisor.

torch.export takes sides of 1 as fixed, so that no level of a pyramid may have one; and sides should be told apart.
"""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ExportJob:
    """What is asked for; see `jobs/export.py`."""

    checkpoint: str
    output: Folder
    canvas: tuple[int, int] | None
    images: int  # to compare on, at most
    command: str
    manifest: Manifest | None = None  # annotated images to compare on
    inputs: Inputs | None = None  # or others


def export(job: ExportJob) -> Parity | None:
    """Write model.onnx, pretrained/, README.md and, where there are images to compare on, parity.json.

    Returns:
        How ONNX and checkpoint compare, where there are images.

    Raises:
        UserError: a checkpoint that cannot be read, a model or canvas that cannot be exported, no readable image.
        TrainingError: what was exported does not answer as the checkpoint; it is written all the same.
    """
    checkpoint = open_checkpoint(job.checkpoint)
    predictor = Predictor(checkpoint, CPU, precision="fp32")  # as the file computes
    graph = graph_of(checkpoint.build(CPU))
    divisor = graph.detector.size_divisor
    if job.canvas and any(side % divisor for side in job.canvas):
        raise UserError(f"--canvas {job.canvas[0]},{job.canvas[1]}: both must be multiples of {divisor}")
    example = job.canvas or (divisor * EXAMPLE_CELLS[0], divisor * EXAMPLE_CELLS[1])
    about = interface(checkpoint, graph, job.canvas)
    with tempfile.TemporaryDirectory(prefix="ray_det_") as scratch:
        folder = Path(scratch)
        write_onnx(graph, folder / "model.onnx", example, dynamic=job.canvas is None, about=about)
        write_pretrained(graph.detector, folder / "pretrained")
        parity = _parity(job, checkpoint, predictor, folder / "model.onnx")
        if parity is not None:
            (folder / PARITY).write_text(json.dumps(parity.to_json(), indent=1))
        card = model_card(checkpoint, graph.detector, about, _metrics(job.checkpoint), parity, job.command)
        (folder / "README.md").write_text(card)
        (job.output / PARITY).delete()  # an older one is of another model.onnx
        job.output.upload(folder)
    if parity is not None and parity.failures:
        raise TrainingError(f"ONNX differs from the checkpoint, see {job.output.uri}: {'; '.join(parity.failures)}")
    return parity


def _parity(job: ExportJob, checkpoint: Checkpoint, predictor: Predictor, path: Path) -> Parity | None:
    if job.manifest is None and job.inputs is None:
        return None
    detector, max_bytes = OnnxDetector(path, torch.get_num_threads()), checkpoint.config.data.max_bytes
    if job.manifest is not None:
        part, images = annotated(job.manifest, job.images)
        return with_ap(part, *compare(predictor, detector, images, job.canvas, max_bytes))
    assert job.inputs is not None
    return compare(predictor, detector, _first(job.inputs, job.images), job.canvas, max_bytes)[0]


def _first(inputs: Inputs, most: int) -> Iterator[InputImage]:
    images = (image for shard in inputs.shards for image in inputs.read(shard))
    return (image for image, _ in zip(images, range(most), strict=False))


def _metrics(location: str) -> dict[str, object]:
    """Of the run that the checkpoint is from, where it is a run folder."""
    folder = Folder.at(location)
    return folder.read_json("summary.json") if folder.exists("summary.json") else {}
