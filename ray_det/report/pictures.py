"""Pictures with true and predicted boxes drawn in, for people to look at.

True boxes are dashed blue with their label below the lower edge, predictions solid orange with label and score above
the upper edge: line style, side and colours (Okabe & Ito's, told apart with any colour vision) all say the same.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TRUE_COLOUR = (0, 114, 178)
PREDICTED_COLOUR = (230, 159, 0)
HALO = (255, 255, 255)
SMALLEST, WIDEST = 480, 1024  # longest side of what is drawn, pixels
JPEG_QUALITY = 85

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Picture:
    """An image with what is there and what was found; boxes are xyxy in its own pixels, labels contiguous."""

    image_id: int
    pixels_HW3: np.ndarray  # uint8 RGB
    true_boxes_N4: np.ndarray
    true_labels_N: np.ndarray
    boxes_N4: np.ndarray
    scores_N: np.ndarray  # 0..1
    labels_N: np.ndarray


def draw(picture: Picture, names: Sequence[str], min_score: float = 0.3) -> np.ndarray:
    """uint8 (H', W', 3): the picture with its boxes, the longest side brought to 480..1024 pixels.

    Args:
        names: class names by label.
        min_score: predictions below it are left out.
    """
    image, scale = _resized(picture.pixels_HW3)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(12, max(image.size) // 50))
    true = [_inside(box, image.size) for box in picture.true_boxes_N4 * scale]
    found = [i for i in range(len(picture.scores_N)) if picture.scores_N[i] >= min_score][::-1]  # the best on top
    boxes = {i: _inside(picture.boxes_N4[i] * scale, image.size) for i in found}
    for box in true:
        _dashed(pen, box)
    for box in boxes.values():
        pen.rectangle(box, outline=HALO, width=4)
        pen.rectangle(_grown(box, -1), outline=PREDICTED_COLOUR, width=2)
    for box, label in zip(true, picture.true_labels_N, strict=True):
        _tag(pen, font, box, names[int(label)], TRUE_COLOUR, below=True)
    for i, box in boxes.items():
        text = f"{names[int(picture.labels_N[i])]} {picture.scores_N[i]:.2f}"
        _tag(pen, font, box, text, PREDICTED_COLOUR, below=False)
    return np.asarray(image)


def to_jpeg(pixels_HW3: np.ndarray) -> bytes:
    """A JPEG file of uint8 RGB pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels_HW3).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _resized(pixels_HW3: np.ndarray) -> tuple[Image.Image, float]:
    image = Image.fromarray(pixels_HW3).convert("RGB")
    longest = max(image.size)
    scale = float(np.clip(longest, SMALLEST, WIDEST)) / longest
    if scale == 1:
        return image, scale
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC), scale


def _inside(box: np.ndarray, size: tuple[int, int]) -> Box:
    x0, y0, x1, y1 = (float(v) for v in box)
    right, bottom = size[0] - 1, size[1] - 1
    x0, y0 = min(max(x0, 0), right), min(max(y0, 0), bottom)
    return x0, y0, min(max(x1, x0), right), min(max(y1, y0), bottom)


def _grown(box: Box, by: float) -> Box:
    """`box` grown by so many pixels on every side; one too small to shrink stays."""
    x0, y0, x1, y1 = box[0] - by, box[1] - by, box[2] + by, box[3] + by
    return (x0, y0, x1, y1) if x0 <= x1 and y0 <= y1 else box


def _dashed(pen: ImageDraw.ImageDraw, box: Box, dash: int = 7, gap: int = 5) -> None:
    x0, y0, x1, y1 = box
    pen.rectangle(box, outline=HALO, width=3)
    for y in (y0, y1):
        for x in np.arange(x0, x1, dash + gap):
            pen.line((x, y, min(x + dash, x1), y), fill=TRUE_COLOUR, width=3)
    for x in (x0, x1):
        for y in np.arange(y0, y1, dash + gap):
            pen.line((x, y, x, min(y + dash, y1)), fill=TRUE_COLOUR, width=3)


def _tag(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    box: Box,
    text: str,
    colour: Colour,
    *,
    below: bool,
) -> None:
    """A filled label on the outside of the box, moved inside the picture where there is no room."""
    picture = pen.im.size
    _, _, width, height = pen.textbbox((0, 0), text, font=font)
    width, height = width + 6, height + 4
    x = min(box[0], max(0, picture[0] - width))
    y = box[3] if below else box[1] - height
    y = min(max(y, 0), max(0, picture[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + 3, y + 1), text, font=font, fill=(0, 0, 0) if colour == PREDICTED_COLOUR else (255, 255, 255))
