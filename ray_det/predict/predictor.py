"""A trained detector in this process: `ray_det.load(run_folder).predict(images)`."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ray_det.data.augment import shrink_of, whole
from ray_det.data.collate import pad_to_canvas
from ray_det.data.decode import decode, decode_for, read_image, to_rgb
from ray_det.data.files import read_bytes
from ray_det.data.plan import resized, round_up
from ray_det.evaluate.inference import infer
from ray_det.models.compute import use_bf16
from ray_det.models.detector import Detector
from ray_det.retry import PATIENCE_S
from ray_det.storage import Folder
from ray_det.train.checkpoint import Checkpoint
from ray_det.train.session import BEST
from ray_det.types import DEFAULT_LIMITS, ClassList, Detections, ImageLimits, MicroBatch, UserError


def open_checkpoint(location: str, patience_s: float = PATIENCE_S) -> Checkpoint:
    """The checkpoint at a local path or URI: a checkpoint's folder, or a run's, of which it is the best or the latest.
    A remote one is copied to the disk, for as long as it is held.

    Args:
        patience_s: seconds for which a remote storage may be out of reach.

    Raises:
        UserError: there is none, or a broken one.
    """
    folder = Folder.at(location, patience_s)
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
    try:
        folder.download(local)
        checkpoint = Checkpoint.open(local)
    except BaseException:
        shutil.rmtree(local, ignore_errors=True)
        raise
    weakref.finalize(checkpoint, shutil.rmtree, local, ignore_errors=True)  # it reads its files when it is asked
    return checkpoint


class Predictor:
    """A detector with its classes. Boxes are in pixels of the stored image; EXIF orientations are not applied."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        limits: ImageLimits | None = None,
        precision: str | None = None,
    ) -> None:
        """
        Args:
            limits: of image files; default: as in training.
            precision: `auto`, `fp32` or `bf16`; default: as in training.

        Raises:
            UserError: another precision.
        """
        if precision not in (None, "auto", "fp32", "bf16"):
            raise UserError(f"precision '{precision}': expected auto, fp32 or bf16")
        self.classes: ClassList = checkpoint.classes
        self.device = device
        self._config = checkpoint.config
        self._bf16 = use_bf16(precision or checkpoint.config.train.precision, device)
        self._limits = limits or checkpoint.config.data.limits
        self._detector: Detector = checkpoint.build(device)

    def predict(self, images: Sequence[Any]) -> list[Detections]:
        """Detections of every image, in order; `image_id` is its position.

        Args:
            images: each a path or URI, the bytes of a file, a PIL image, or uint8 (H, W, 3) RGB.

        Raises:
            UserError: an image cannot be read.
        """
        found = self.detect(self.prepare(image, i) for i, image in enumerate(images))
        return [detections for batch in found for detections in batch]

    def prepare(self, image: Any, image_id: int = 0) -> MicroBatch:
        """A batch of one image, on the canvas that it has in training's evaluations; needs no device.

        Raises:
            UserError: the image, as in `predict`, cannot be read.
        """
        return self._batch(image_id, *self._decode(image))

    def detect(self, batches: Iterable[MicroBatch]) -> Iterator[list[Detections]]:
        """Detections of every batch's images, by a forward pass each. Images of one canvas make one batch
        (`MicroBatch.joined`), and find what they find alone.
        """
        for inferred in infer(self._detector, batches, self.device, bf16=self._bf16):
            yield inferred.detections

    def _decode(self, image: Any) -> tuple[np.ndarray, tuple[int, int]]:
        """Pixels, of a file as `data.scaled_decode` has it, and (h, w) as stored."""
        data = self._config.data
        if not data.scaled_decode or not isinstance(image, str | Path | bytes):
            pixels = to_pixels(image, self._limits)
            return pixels, (pixels.shape[0], pixels.shape[1])
        content = image if isinstance(image, bytes) else read_bytes(str(image), self._limits.bytes)
        name = "<bytes>" if isinstance(image, bytes) else str(image)
        return decode_for(content, name, lambda size: shrink_of(whole(size, self._fit(size))), self._limits)

    def _fit(self, size: tuple[int, int]) -> tuple[int, int]:
        data = self._config.data
        height, width = resized(np.array(size[0]), np.array(size[1]), data.image_size, data.resize)
        return int(height), int(width)

    def _batch(self, image_id: int, image_HW3: np.ndarray, size: tuple[int, int]) -> MicroBatch:
        fit = self._fit(size)
        height, width = (int(v) for v in round_up(np.array(fit), self._detector.size_divisor))
        pixels = np.empty((1, height, width, 3), np.uint8)
        pad_to_canvas(image_HW3, size, fit, self._config.data.padding, pixels[0])
        return MicroBatch(
            epoch=0,
            step=image_id,
            index=0,
            pixels_BHW3=pixels,
            sizes_B2=np.array([fit], np.int32),
            orig_sizes_B2=np.array([size], np.int32),
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
