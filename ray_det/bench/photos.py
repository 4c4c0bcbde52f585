"""Pictures that cost what photographs cost to read and decode, of the sizes that COCO has."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

COMMON_SIZES = {
    (480, 640): 26.0, (427, 640): 15.0, (640, 480): 8.5, (426, 640): 8.0, (375, 500): 4.5, (640, 427): 4.0,
    (428, 640): 3.5, (425, 640): 3.0, (640, 640): 2.7, (424, 640): 2.1, (640, 426): 1.7, (333, 500): 1.6,
    (612, 612): 1.4, (500, 375): 1.3, (360, 640): 1.2,
}  # fmt: skip
"""(h, w) -> about how many percent of COCO's train2017 have it. The rest has 640 pixels on its longer side."""
QUALITY = 90


def coco_sizes(number: int, seed: int) -> np.ndarray:
    """int32 (number, 2): (h, w), drawn as they are frequent in COCO."""
    rng = np.random.default_rng(seed)
    common, shares = np.array(list(COMMON_SIZES)), np.array(list(COMMON_SIZES.values())) / 100
    choice = rng.choice(len(common) + 1, size=number, p=[*shares, 1 - shares.sum()])
    aspect = np.exp(rng.uniform(np.log(0.55), np.log(1.8), number))  # w / h
    rare = np.round(640 * np.stack([np.minimum(1 / aspect, 1), np.minimum(aspect, 1)], axis=1)).astype(np.int64)
    return np.where((choice == len(common))[:, None], rare, common[choice % len(common)]).astype(np.int32)


def draw(folder: Path, sizes_N2: np.ndarray, boxes_each: int = 7) -> Path:
    """JPEGs of these sizes with random boxes -> their COCO JSON; what lies there already is taken as it is."""
    path = folder / "annotations.json"
    if path.exists():
        return path
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i, (height, width) in enumerate(sizes_N2.tolist()):
        rng = np.random.default_rng(i)
        name = f"{i:06d}.jpg"
        photo = simplejpeg.encode_jpeg(_photo(rng, height, width), quality=QUALITY, colorsubsampling="420")
        (folder / "images" / name).write_bytes(photo)
        images.append({"id": i + 1, "file_name": name, "height": height, "width": width})
        for _ in range(boxes_each):
            w, h = (float(rng.uniform(0.1, 0.5)) * side for side in (width, height))
            box = [float(rng.uniform(0, width - w)), float(rng.uniform(0, height - h)), w, h]
            number = len(annotations) + 1
            known = {"id": number, "image_id": i + 1, "category_id": 1 + number % 80, "iscrowd": 0}
            annotations.append(known | {"bbox": box, "area": w * h})
    categories = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(80)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def _photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): noise whose amplitude falls with its frequency, as a photograph's does; half a byte a pixel."""
    picture = np.full((height, width, 3), 128, np.float32)
    for side, amplitude in ((4, 60), (16, 30), (64, 18), (160, 12), (480, 9)):
        noise = rng.normal(0, amplitude, (max(1, side * height // width), side, 3)).astype(np.float32)
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture, 0, 255).astype(np.uint8)
