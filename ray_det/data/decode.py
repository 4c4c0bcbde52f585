"""Bytes to pixels: the one decoder of training, evaluation and prediction.

Pixels are used as they are stored. An EXIF orientation is never applied, as in COCO's own tools: annotations, training,
evaluation and prediction all speak of the stored picture. What is not 8-bit RGB becomes it by these rules:

* transparency is ignored: a pixel has the colour that is stored, whatever its alpha;
* 16 bits keep their upper 8, gray and colour alike;
* 32-bit integers and floats have no natural range: the picture's own lowest value becomes 0, its highest 255;
* of several frames or pages the first is used.

Files are not trusted: what they claim is compared with limits before anything of that size is read or decoded.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from ray_det.data import files
from ray_det.data.files import OverLimitError
from ray_det.data.parts import is_outage
from ray_det.types import DEFAULT_LIMITS, ImageLimits, UserError

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
"""Pillow's names of what is read (MPO is a JPEG). Others are seldom pictures, and trouble: EPS starts a program."""
MAX_SCANS = 64
"""Scans of one JPEG. Progressive ones have about ten; 30 bytes can ask for one more pass over all of the pixels."""
_TILE_SIZE_TAGS = (322, 323)
_ORIENTATION_TAG = 0x0112
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def read_image(path: str, limits: ImageLimits = DEFAULT_LIMITS) -> np.ndarray:
    """uint8 (H, W, 3) RGB pixels, as stored, of the file at a path or URI.

    Raises:
        UserError: it cannot be read, is over a limit, or is not an image or a broken one.
    """
    return decode(files.read_bytes(path, limits.bytes), path, limits)


def decode(data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> np.ndarray:
    """uint8 (H, W, 3) RGB pixels as stored.

    Gray and colour JPEGs take libjpeg-turbo directly; all else, and what that refuses, takes Pillow with its guard
    against decompression bombs.

    Raises:
        UserError: `name` is not an image, a broken one, or over a limit.
    """
    return decode_for(data, name, lambda size: 1, limits)[0]


def decode_for(
    data: bytes, name: str, shrink: Callable[[tuple[int, int]], int], limits: ImageLimits = DEFAULT_LIMITS
) -> tuple[np.ndarray, tuple[int, int]]:
    """As `decode`, but a JPEG may come out smaller; -> (pixels, (h, w) as stored).

    Args:
        shrink: given (h, w) as stored, says by which of 1, 2, 4 and 8 both may be divided, rounded up. libjpeg-turbo
            leaves out frequencies then: that is faster than decoding them, and low-pass filters. It knows eighths in
            between too, which take longer than all of the picture.

    Raises:
        UserError: as `decode`.
    """
    try:
        if len(data) > limits.bytes:
            raise files.too_large(len(data), limits.bytes)
        found = _decode_jpeg(data, shrink, limits) if data[:2] == b"\xff\xd8" else None
        if found is None:
            pixels = _decode_any(data, limits)
            return pixels, (pixels.shape[0], pixels.shape[1])
        return found
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file
        raise UserError(f"cannot decode image {name}: {reason(error)}") from error


def _decode_jpeg(
    data: bytes, shrink: Callable[[tuple[int, int]], int], limits: ImageLimits
) -> tuple[np.ndarray, tuple[int, int]] | None:
    """None for what only Pillow can decide: CMYK, and files with errors, which it forgives or names."""
    check_scans(data)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB", "Gray"):
            return None
        _check_size(int(width), int(height), limits)
        size = int(height), int(width)
        by = shrink(size)
        least = (-(-size[0] // by), -(-size[1] // by)) if by > 1 else (0, 0)  # 0: all of it
        return simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=least[0], min_width=least[1]), size
    except OverLimitError:
        raise
    except ValueError:
        return None


def _decode_any(data: bytes, limits: ImageLimits) -> np.ndarray:
    with open_image(io.BytesIO(data), limits) as image:
        applied = orientation(image) if image.format == "TIFF" else 1
        image.load()
        return to_rgb(image.transpose(_UNDO[applied]) if applied in _UNDO else image)


def open_image(file: Any, limits: ImageLimits) -> Image.Image:
    """The image in a binary file, its header read and found to be within the limits, its pixels not yet decoded."""
    image = Image.open(file, formats=FORMATS)
    _check_size(image.width, image.height, limits)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (cast(int, image.tag_v2.get(tag, 1)) for tag in _TILE_SIZE_TAGS)
        _check_size(width, height, limits)  # a tile is decoded whole
    return image


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(h, w) of the stored pixels: Pillow gives a TIFF's as they will be when its orientation is applied."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.tag_v2[TiffImagePlugin.IMAGELENGTH], image.tag_v2[TiffImagePlugin.IMAGEWIDTH]
    return image.height, image.width


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an image that is not loaded yet, 1..8; 1 where there is none."""
    if image.format != "TIFF" and "exif" not in image.info:
        return 1  # Pillow would decode a PNG to look for it
    try:
        value: Any = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception as error:  # a broken EXIF block does not make the pixels unreadable
        if is_outage(error):
            raise
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of any mode of Pillow's; see the module for the rules."""
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # which has 16 bits too
        gray = (np.asarray(image) >> 8).astype(np.uint8)
    elif image.mode in ("I", "F"):
        gray = _stretched(np.asarray(image))
    else:
        if "transparency" in image.info:
            image = image.copy()
            del image.info["transparency"]  # Pillow would warn that it is lost
        return np.asarray((image.convert("LA") if image.mode == "La" else image).convert("RGB"))
    return np.repeat(gray[:, :, None], 3, axis=2)


def _stretched(values_HW: np.ndarray) -> np.ndarray:
    """uint8 (H, W): the lowest finite value becomes 0, the highest 255; NaN 0."""
    values = values_HW.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    scaled = (np.clip(np.nan_to_num(values, nan=low), low, high) - low) * (255 / ((high - low) or 1))
    return np.round(scaled).astype(np.uint8)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise OverLimitError(f"it has no pixels: {width} x {height}")
    if width * height > limits.pixels:
        raise OverLimitError(f"{width} x {height} are more pixels than max_pixels {limits.pixels}")


def check_scans(data: bytes) -> None:
    """Raises:
    OverLimitError: a JPEG has more than `MAX_SCANS` scans. Other files pass.
    """
    # The count is a bound from above: it takes bytes of thumbnails and of what stands behind the picture too.
    if data[:2] != b"\xff\xd8":
        return
    octets = np.frombuffer(data, np.uint8)
    if np.count_nonzero(octets[1:][octets[:-1] == 0xFF] == 0xDA) <= MAX_SCANS:  # three times as fast as bytes.count
        return
    at = scans = 0
    while (found := _MARKER.search(data, at + 2)) and found[0] != b"\xff\xd9":
        at = found.start()
        scans += found[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise OverLimitError(f"more than {MAX_SCANS} scans in a JPEG")
        at += int.from_bytes(data[at + 2 : at + 4], "big")  # the segment's length; entropy-coded bytes may follow


def reason(error: BaseException) -> str:
    """One line without the path or the object that was read: it is the same wherever the data lies."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a kind that is not read"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = " ".join((text or type(error).__name__).split())
    return line if isinstance(error, OverLimitError) else f"{type(error).__name__}: {line}"
