"""Pictures whose boxes are found again by their pixels: each is filled with a hue of its own, on black."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ray_det.data.manifest import Manifest
from ray_det.data.prepare import prepare

HUES = 30
"""Classes, one hue each. Of OpenCV's 180 hues every sixth."""


def hue_colour(label: int) -> np.ndarray:
    """(3,) RGB. What resizing blends with black keeps the hue."""
    return cv2.cvtColor(np.array([[[label * 180 // HUES, 255, 255]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0]


def paint(folder: Path, sizes: list[tuple[int, int]], tallest: float = 1.0) -> Manifest:
    """A data set of PNGs of these (h, w), with two boxes each that do not touch; two of fifteen share their classes."""
    rng, images, annotations = np.random.default_rng(0), [], []
    (folder / "images").mkdir(parents=True)
    for i, (height, width) in enumerate(sizes):
        picture, half = np.zeros((height, width, 3), np.uint8), width // 2
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": height, "width": width})
        for k in range(2):
            w, h = int(rng.integers(half // 3, half - 8)), int(rng.integers(height // 4, int(tallest * height) - 8))
            x, y = k * half + int(rng.integers(4, half - w - 3)), int(rng.integers(4, height - h - 3))
            label = (2 * i + k) % HUES
            picture[y : y + h, x : x + w] = hue_colour(label)
            box = {"id": len(annotations) + 1, "image_id": i + 1, "bbox": [x, y, w, h], "area": w * h}
            annotations.append(box | {"category_id": label + 1, "iscrowd": 0})
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
    classes = [{"id": i + 1, "name": f"hue{i}"} for i in range(HUES)]
    document = {"images": images, "annotations": annotations, "categories": classes}
    (folder / "painted.json").write_text(json.dumps(document))
    return prepare(str(folder / "painted.json"), str(folder / "images"), folder / "cache")[0]


def classes(pixels_HW3: np.ndarray, brightness: int = 127) -> np.ndarray:
    """(H, W) class of each pixel, by its hue; -1: none.

    Args:
        brightness: half of that of a whole pixel.
    """
    hue, saturation, value = np.moveaxis(cv2.cvtColor(pixels_HW3, cv2.COLOR_RGB2HSV).astype(int), 2, 0)
    label = np.round(hue * HUES / 180).astype(int) % HUES
    distance = np.abs((hue - label * 180 // HUES + 90) % 180 - 90)
    return np.where((distance <= 2) & (saturation > 200) & (value > brightness), label, -1)


def regions(classes_HW: np.ndarray) -> dict[int, np.ndarray]:
    """(R, 4) xyxy around each connected region of a class, by class."""
    found = {}
    for one in set(np.unique(classes_HW).tolist()) - {-1}:
        x, y, w, h, _ = cv2.connectedComponentsWithStats((classes_HW == one).astype(np.uint8), connectivity=4)[2][1:].T
        found[one] = np.stack([x, y, x + w, y + h], axis=1)
    return found
