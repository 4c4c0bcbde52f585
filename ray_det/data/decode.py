"""Bytes to pixels: the one decoder of training, evaluation and prediction.

Pixels are used as they are stored. An EXIF orientation is never applied, as in COCO's own tools: annotations, training,
evaluation and prediction all speak of the stored picture.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

from ray_det.types import UserError


def decode(data: bytes, name: str) -> np.ndarray:
    """uint8 (H, W, 3) RGB pixels as stored.

    Gray and colour JPEGs take libjpeg-turbo directly; all else, and what that refuses, takes Pillow with its guard
    against decompression bombs.

    Raises:
        UserError: `name` is not an image, or a broken one.
    """
    if data[:2] == b"\xff\xd8":
        try:
            if simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "RGB", "Gray"):
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass  # Pillow decides, and says what is wrong
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot decode image {name}: {error}") from error
