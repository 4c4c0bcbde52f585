"""Drawn photographs for benchmarks: as large as COCO's, as costly to decode, with as many boxes of as many classes.

What a decoder meets is the sizes, the bits per pixel and noise whose power falls with the square of the frequency, as
in natural images (Field, J. Opt. Soc. Am. A 4, 1987). What a model sees is of no use: nothing is learned here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np

from ray_det.data import files

VERSION = 2
CLASSES = 80
BOXES = 7.3
"""Mean boxes of an image, as in COCO's train2017."""
QUALITY = 89
"""JPEG quality that gives about COCO's 4.5 bits per pixel."""
SIZES = {
    (480, 640): 25,
    (427, 640): 16,
    (640, 480): 9,
    (425, 640): 9,
    (375, 500): 8,
    (640, 427): 8,
    (428, 640): 8,
    (334, 500): 5,
    (640, 640): 5,
    (400, 640): 7,
    (383, 640): 6,
    (500, 375): 3,
    (511, 640): 6,
    (640, 383): 1,
    (612, 612): 2,
    (461, 614): 2,
    (240, 320): 1,
    (559, 640): 2,
}
"""(height, width) of 123 photographs of COCO 2017 with how often, rare sizes counted with their neighbours."""


def coco_sizes(number: int, *, seed: int = 0) -> np.ndarray:
    """int64 (number, 2): (height, width), drawn as they are frequent in COCO."""
    shares = np.array(list(SIZES.values()))
    return np.random.default_rng(seed).choice(list(SIZES), size=number, p=shares / shares.sum())


def draw(folder: Path, sizes_N2: np.ndarray) -> Path:
    """Write JPEG files of these sizes and a COCO JSON under `folder`; a second call finds them and does nothing.

    Returns:
        The JSON; its `file_name`s start at the folder.
    """
    wanted = json.dumps({"version": VERSION, "sizes": sizes_N2.tolist()})
    path, marker = folder / "photos.json", folder / "done.json"
    if marker.is_file() and marker.read_text() == wanted:
        return path
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    records, annotations = [], []
    for i, (height, width) in enumerate(sizes_N2.tolist(), start=1):
        name = f"{i:06d}.jpg"
        if not cv2.imwrite(str(folder / name), photo(rng, height, width), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]):
            raise OSError(f"cannot write {folder / name}")
        records.append({"id": i, "file_name": name, "height": height, "width": width})
        annotations += boxes(rng, i, height, width, first_id=len(annotations) + 1)
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
    path.write_text(json.dumps({"images": records, "annotations": annotations, "categories": categories}))
    with files.replacing(marker) as temporary:
        temporary.write_text(wanted)
    return path


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): gray noise of amplitude 1 / frequency under slow changes of colour."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).astype(np.float32)
    frequency[0, 0] = np.inf
    white = rng.standard_normal((height, width), np.float32)
    noise = np.fft.irfft2(np.fft.rfft2(white) / frequency, (height, width))
    colour = cv2.resize(rng.standard_normal((8, 8, 3), np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(115 + 55 / noise.std() * noise[..., None] + 25 * colour, 0, 255).astype(np.uint8)


def boxes(rng: np.random.Generator, image_id: int, height: int, width: int, first_id: int) -> list[dict]:
    """COCO's annotations of one image: sides from a fiftieth of the image's to all of it, small ones most often."""
    count = rng.poisson(BOXES)
    w, h = (np.exp(rng.uniform(np.log(0.02), 0, count)) * side for side in (width, height))
    x, y = (rng.uniform(0, side - extent) for side, extent in ((width, w), (height, h)))
    labels = rng.integers(1, CLASSES + 1, count)
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": int(labels[i]),
            "bbox": [float(x[i]), float(y[i]), float(w[i]), float(h[i])],
            "area": float(w[i] * h[i]),
            "iscrowd": 0,
        }
        for i in range(count)
    ]
