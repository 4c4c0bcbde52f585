"""A small detection data set made on the spot, for a first run without any data: coloured shapes on textured grounds.

Not a toy of flat colours: sizes, aspect ratios, grounds, lighting, rotation and scale vary, shapes overlap a little,
some pictures hold no object, some hold a crowd, and crosses and arcs are there that are no object at all.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ray_det.data import files

CATEGORIES = {1: "disc", 3: "box", 7: "triangle"}
VERSION = 1
EMPTY_SHARE = 0.05
CROWD_SHARE = 0.06
_FINE = 4  # shapes are drawn this much larger, then averaged down
_MAX_HIDDEN = 0.12  # share of a shape that later ones may cover


@dataclass(frozen=True)
class Thing:
    """An annotated object, or with `crowd` a group of small ones under one box."""

    category_id: int
    box: tuple[int, int, int, int]  # xywh, tight to the visible pixels
    area: int  # visible pixels
    crowd: bool


@dataclass(frozen=True)
class Scene:
    pixels_HW3: np.ndarray  # uint8 RGB
    owner_HW: np.ndarray  # int32: index + 1 of the thing that a pixel shows, 0 for ground and distractors
    things: list[Thing]


def generate(folder: Path, *, seed: int = 0, train: int = 240, val: int = 60, test: int = 60) -> dict[str, Path]:
    """Write JPEG files and a COCO JSON per split under `folder`; a second call finds them and does nothing.

    Returns:
        Split name -> its JSON.
    """
    sizes = {"train": train, "val": val, "test": test}
    paths = {split: folder / f"{split}.json" for split in sizes}
    wanted = json.dumps({"version": VERSION, "seed": seed, **sizes})
    marker = folder / "done.json"
    if marker.is_file() and marker.read_text() == wanted:
        return paths
    marker.unlink(missing_ok=True)
    shutil.rmtree(folder / "images", ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    for number, (split, count) in enumerate(sizes.items()):
        _write_split(folder, paths[split], split, count, np.random.SeedSequence([seed, number]))
    with files.replacing(marker) as temporary:
        temporary.write_text(wanted)
    return paths


def _write_split(folder: Path, path: Path, split: str, count: int, seed: np.random.SeedSequence) -> None:
    images, annotations = [], []
    for i, child in enumerate(seed.spawn(count), start=1):
        scene = draw_scene(np.random.default_rng(child))
        height, width = scene.owner_HW.shape
        name = f"{split}_{i:04d}.jpg"
        if not cv2.imwrite(str(folder / "images" / name), scene.pixels_HW3[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92]):
            raise OSError(f"cannot write {folder / 'images' / name}")
        images.append({"id": i, "file_name": name, "height": height, "width": width})
        for thing in scene.things:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": thing.category_id,
                    "bbox": list(thing.box),
                    "area": thing.area,
                    "iscrowd": int(thing.crowd),
                }
            )
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def draw_scene(rng: np.random.Generator) -> Scene:
    """One picture: ground, distractors, shapes, then light over all of it."""
    aspect = 2 ** rng.uniform(-1, 1)
    side = rng.uniform(230, 340)  # geometric mean of the sides: they lie within 162..481
    height, width = round(side / aspect**0.5), round(side * aspect**0.5)
    canvas = _ground(rng, height, width)
    owner = np.zeros((height, width), np.int32)
    for _ in range(rng.integers(0, 3)):
        _draw_distractor(rng, canvas)
    kinds: list[tuple[int, bool]] = []
    if rng.random() >= EMPTY_SHARE:
        if rng.random() < CROWD_SHARE:
            kinds.append((_category(rng), True))
            _draw_crowd(rng, canvas, owner, 1, kinds[0][0])
        for _ in range(rng.integers(1, 7)):
            category_id = _category(rng)
            if _draw_object(rng, canvas, owner, len(kinds) + 1, category_id):
                kinds.append((category_id, False))
    pixels = np.clip(_light(rng, canvas), 0, 255).astype(np.uint8)
    return Scene(pixels, owner, [_thing(owner, i, *kind) for i, kind in enumerate(kinds, start=1)])


def _category(rng: np.random.Generator) -> int:
    return int(rng.choice(list(CATEGORIES)))


def _thing(owner_HW: np.ndarray, index: int, category_id: int, crowd: bool) -> Thing:
    rows, columns = np.nonzero(owner_HW == index)
    x, y = int(columns.min()), int(rows.min())
    box = (x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y)
    return Thing(category_id, box, len(rows), crowd)


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32 (H, W, 3) 0..255: a gradient between two muted colours with stripes, checks or blots, and grain."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(14, 60)
    along = (x * np.cos(angle) + y * np.sin(angle)).astype(np.float32)
    across = (y * np.cos(angle) - x * np.sin(angle)).astype(np.float32)
    ramp = (along - along.min()) / np.ptp(along)
    base = rng.uniform(60, 190)
    first, second = ((base + rng.uniform(-30, 30, 3)).astype(np.float32) for _ in range(2))
    ground = first + (second - first) * ramp[..., None]
    texture = {
        "stripes": lambda: np.sin(along * 2 * np.pi / period),
        "checks": lambda: np.sign(np.sin(along * np.pi / period) * np.sin(across * np.pi / period)),
        "blots": lambda: _smooth_noise(rng, height, width, period),
        "plain": lambda: np.zeros((height, width), np.float32),
    }[str(rng.choice(["stripes", "checks", "blots", "plain"]))]()
    ground += texture[..., None] * rng.uniform(6, 20)
    ground += rng.standard_normal((height, width, 1), np.float32) * rng.uniform(2, 7)
    return ground


def _smooth_noise(rng: np.random.Generator, height: int, width: int, period: float) -> np.ndarray:
    coarse = rng.normal(0, 1, (int(height / period) + 2, int(width / period) + 2)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _light(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """A slow change of brightness over the whole picture."""
    height, width = canvas.shape[:2]
    return canvas * (1 + 0.08 * _smooth_noise(rng, height, width, 200)[..., None])


def _colour(rng: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    """(3,) RGB 0..255 that stands out from the mean colour behind."""
    while True:
        colour = rng.uniform(10, 245, 3)
        if np.linalg.norm(colour - behind) > 110:
            return colour


def _outline(rng: np.random.Generator, category_id: int, radius: float) -> np.ndarray:
    """(P, 2) corner points around (0, 0), turned at random."""
    if category_id == 1:
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        points = np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.8, 1)], axis=1)
    elif category_id == 3:
        flat = rng.uniform(0.55, 1)
        points = np.array([[-1, -flat], [1, -flat], [1, flat], [-1, flat]]) / (1 + flat**2) ** 0.5 * 1.15
    else:
        angles = np.deg2rad([90, 210, 330]) + rng.uniform(-0.15, 0.15, 3)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * 1.15
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return points @ rotation.T * radius


def _coverage(points: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window (rows, columns) around a polygon and float32 (h, w) 0..1, the share of each pixel inside of it."""
    x0, y0 = np.floor(points.min(axis=0)).astype(int) - 1
    x1, y1 = np.ceil(points.max(axis=0)).astype(int) + 1
    fine = np.zeros(((y1 - y0) * _FINE, (x1 - x0) * _FINE), np.uint8)
    cv2.fillPoly(fine, [np.round((points - (x0, y0)) * _FINE).astype(np.int32)], 255)
    cover = cv2.resize(fine, (int(x1 - x0), int(y1 - y0)), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return (slice(y0, y1), slice(x0, x1)), cover


def _draw_object(rng: np.random.Generator, canvas: np.ndarray, owner: np.ndarray, index: int, category_id: int) -> bool:
    """Put a shape where it covers little of earlier ones; False where there is no such place."""
    size = np.array(owner.shape[::-1])
    for _ in range(20):
        radius = max(11.0, np.exp(rng.uniform(np.log(0.055), np.log(0.30))) * size.min())
        points = _outline(rng, category_id, radius)
        centre = np.clip(rng.uniform([0, 0], size), 2 - points.min(axis=0), size - 2 - points.max(axis=0))
        window, cover = _coverage(points + centre)
        mask = cover >= 0.5
        if _hides_little(owner, owner[window][mask]):
            _paint(rng, canvas[window], cover)
            owner[window][mask] = index
            return True
    return False


def _hides_little(owner: np.ndarray, behind: np.ndarray) -> bool:
    """Whether a new shape in front of the pixels `behind` covers nearly nothing of what is seen of any earlier one."""
    hidden = np.bincount(behind, minlength=1)
    if len(hidden) == 1:
        return True
    visible = np.bincount(owner.ravel(), minlength=len(hidden))[: len(hidden)]
    return bool(np.all(hidden[1:] <= _MAX_HIDDEN * visible[1:]))


def _paint(rng: np.random.Generator, canvas: np.ndarray, cover: np.ndarray) -> None:
    """Blend a shaded, grained surface of one colour into the canvas."""
    height, width = cover.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    slope = (x * np.cos(angle) + y * np.sin(angle)).astype(np.float32)
    grain = rng.standard_normal(cover.shape, np.float32) * rng.uniform(0.01, 0.05)
    shade = 1 + rng.uniform(0.05, 0.22) * slope + grain
    if rng.random() < 0.3:
        shade += 0.1 * np.sin(slope * rng.uniform(5, 12))
    surface = _colour(rng, canvas[cover >= 0.5].mean(axis=0)) * shade[..., None]
    canvas += cover[..., None] * (surface - canvas)


def _draw_crowd(rng: np.random.Generator, canvas: np.ndarray, owner: np.ndarray, index: int, category_id: int) -> None:
    """15 to 30 small shapes of one kind inside of a rectangle."""
    size = np.array(owner.shape[::-1])
    extent = rng.uniform(0.3, 0.5, 2) * size
    corner = rng.uniform([8, 8], size - extent - 8)
    for _ in range(rng.integers(15, 31)):
        centre = rng.uniform(corner + 8, corner + extent - 8)
        window, cover = _coverage(_outline(rng, category_id, rng.uniform(4, 7)) + centre)
        _paint(rng, canvas[window], cover)
        owner[window][cover >= 0.5] = index


def _draw_distractor(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """A cross or an arc in a colour of its own: no object."""
    height, width = canvas.shape[:2]
    x, y = (int(v) for v in rng.uniform([15, 15], [width - 15, height - 15]))
    reach, colour = int(rng.uniform(8, 28)), rng.uniform(10, 245, 3).tolist()
    if rng.random() < 0.5:
        cv2.line(canvas, (x - reach, y - reach), (x + reach, y + reach), colour, 4, cv2.LINE_AA)
        cv2.line(canvas, (x - reach, y + reach), (x + reach, y - reach), colour, 4, cv2.LINE_AA)
    else:
        cv2.ellipse(canvas, (x, y), (reach, reach), rng.uniform(0, 360), 0, 200, colour, 3, cv2.LINE_AA)
