"""A trained detector in this process: `ray_det.load(run_folder).predict(images)`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ray_det.data.collate import pad_to_canvas
from ray_det.data.decode import decode, read_image, to_rgb
from ray_det.data.plan import resized, round_up
from ray_det.evaluate.inference import infer
from ray_det.models.detector import Detector
from ray_det.storage import Folder
from ray_det.train.checkpoint import Checkpoint
from ray_det.train.session import BEST
from ray_det.train.step import use_bf16
from ray_det.types import DEFAULT_LIMITS, ClassList, Detections, ImageLimits, MicroBatch, UserError


def open_checkpoint(location: str) -> Checkpoint:
    """The checkpoint at a local path or URI: a checkpoint's folder, or a run's, of which it is the best or the latest.

    Raises:
        UserError: there is none, or a broken one.
    """
    folder = Folder.at(location)
    if not folder.exists():
        raise UserError(f"no such checkpoint or run folder: {folder.uri}")
    if not folder.exists("state.json"):
        names = folder.names()
        latest = [name for name in names if name.startswith("checkpoint_") and folder.exists(f"{name}/state.json")]
        if BEST not in names and not latest:
            raise UserError(f"no checkpoint in {folder.uri}")
        folder = folder / (BEST if BEST in names else latest[-1])
    if folder.local:
        return Checkpoint.open(folder.local)
    local = Path(tempfile.mkdtemp(prefix="ray_det_checkpoint_"))
    folder.download(local)
    return Checkpoint.open(local)


class Predictor:
    """A detector with its classes. Boxes are in pixels of the stored image; EXIF orientations are not applied."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.classes: ClassList = checkpoint.classes
        self.device = device
        self._config = checkpoint.config
        self._detector: Detector = checkpoint.build(device)

    def predict(self, images: Sequence[Any]) -> list[Detections]:
        """Detections of every image, in order; `image_id` is its position.

        Args:
            images: each a path or URI, the bytes of a file, a PIL image, or uint8 (H, W, 3) RGB.

        Raises:
            UserError: an image cannot be read.
        """
        bf16 = use_bf16(self._config.train.precision, self.device)
        limits = self._config.data.limits
        batches = (self._batch(i, to_pixels(image, limits)) for i, image in enumerate(images))
        found: Iterator = infer(self._detector, batches, self.device, bf16=bf16)
        return [detections for inferred in found for detections in inferred.detections]

    def _batch(self, image_id: int, image_HW3: np.ndarray) -> MicroBatch:
        data, source = self._config.data, image_HW3.shape[:2]
        fit = resized(np.array(source[0]), np.array(source[1]), data.image_size, data.resize)
        height, width = (int(v) for v in round_up(fit, self._detector.size_divisor))
        pixels = np.empty((1, height, width, 3), np.uint8)
        pad_to_canvas(image_HW3, (int(fit[0]), int(fit[1])), data.padding, pixels[0])
        return MicroBatch(
            epoch=0,
            step=image_id,
            index=0,
            pixels_BHW3=pixels,
            sizes_B2=fit[None].astype(np.int32),
            orig_sizes_B2=np.array([source], np.int32),
            image_ids_B=np.array([image_id], np.int64),
            boxes_N4=[np.empty((0, 4), np.float32)],
            labels_N=[np.empty(0, np.int64)],
        )


def to_pixels(image: Any, limits: ImageLimits = DEFAULT_LIMITS) -> np.ndarray:
    """uint8 (H, W, 3) RGB pixels as stored, by the decoder that training uses.

    Raises:
        UserError: it is none of the accepted forms, or cannot be read.
    """
    if isinstance(image, str | Path):
        return read_image(str(image), limits)
    if isinstance(image, bytes):
        return decode(image, "<bytes>", limits)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    described = f"array {image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise UserError(f"an image is a path, bytes, a PIL image or uint8 (H, W, 3) RGB, not {described}")
