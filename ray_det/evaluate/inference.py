"""Micro-batches to detections in pixels of the stored image. The same for training, evaluation and prediction.

Shape legend: B images of a batch, N detections of one image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ray_det import boxes as box_ops
from ray_det.models.detector import Detector, Prediction, to_device
from ray_det.models.pinned import pinned
from ray_det.types import Detections, MicroBatch


@dataclass(frozen=True)
class Inferred:
    """One batch with what the detector says of it."""

    batch: MicroBatch
    detections: list[Detections]
    loss: float | None  # of the batch, where asked for


def infer(
    detector: Detector,
    batches: Iterable[MicroBatch],
    device: torch.device,
    *,
    bf16: bool = False,
    with_loss: bool = False,
) -> Iterator[Inferred]:
    """Run the detector in eval mode over batches; the mode it was in comes back at the end."""
    was_training = detector.training
    detector.eval()
    try:
        for micro in pinned(batches, device):
            batch = to_device(micro, device)
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                losses, found = detector.loss_and_predict(batch) if with_loss else (None, detector.predict(batch))
            detections = [to_image(prediction, micro, i) for i, prediction in enumerate(_to_host(found))]
            yield Inferred(micro, detections, None if losses is None else float(losses["loss"]))
    finally:
        detector.train(was_training)


def _to_host(found: list[Prediction]) -> list[Prediction]:
    """Three transfers for a batch; three for every image would each wait for the device."""
    counts = [len(prediction["scores"]) for prediction in found]
    boxes, scores, labels = (
        torch.cat([prediction[key] for prediction in found]).cpu().split(counts)
        for key in ("boxes", "scores", "labels")
    )
    return [Prediction(boxes=b, scores=s, labels=n) for b, s, n in zip(boxes, scores, labels, strict=True)]


def to_image(prediction: Prediction, micro: MicroBatch, i: int) -> Detections:
    """Canvas pixels -> pixels of the stored image, clipped to it; nothing where the image was skipped."""
    height, width = micro.sizes_B2[i]
    orig_height, orig_width = micro.orig_sizes_B2[i]
    boxes = box_ops.clip(prediction["boxes"].float().cpu().numpy(), height, width)
    scale = np.array([orig_width / width, orig_height / height] * 2, np.float32)
    kept = slice(0 if micro.skipped_B and micro.skipped_B[i] else None)
    return Detections(
        int(micro.image_ids_B[i]),
        (boxes * scale)[kept],
        prediction["scores"].float().cpu().numpy()[kept],
        prediction["labels"].cpu().numpy().astype(np.int64)[kept],
    )
