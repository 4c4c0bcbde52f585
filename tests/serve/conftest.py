"""A checkpoint of a small detector, and pictures of all kinds."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from ray_det.train.checkpoint import TrainState
from ray_det.train.job import RunFacts
from ray_det.train.snapshot import Snapshot
from tests.models.zoo import CLASSES, FAMILIES, build, spread_scores

CONFIG = {"name": "cells", "model": FAMILIES["fcos"].model_dump(), "data": {"image_size": 128, "max_pixels": 1 << 18}}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Of a detector that finds something everywhere."""
    detector = spread_scores(build("fcos"))
    optimizer = torch.optim.AdamW(detector.parameters())
    folder = tmp_path_factory.mktemp("served") / "checkpoint"
    facts = RunFacts(CONFIG, CLASSES, {}, "id")
    Snapshot.of(detector, optimizer, TrainState(global_step=7, best_ap=0.25), facts).write(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(small_coco) -> dict[str, bytes]:
    """JPEGs of several sizes, one of them turned by EXIF, one gray; and a PNG."""
    names = ("test_0001.jpg", "test_0002.jpg", "test_0003.jpg")
    found = {name: (small_coco["test"].parent / "images" / name).read_bytes() for name in names}
    picture = Image.open(io.BytesIO(found["test_0001.jpg"]))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right, for those who apply it
    return found | {
        "turned.jpg": _encoded(picture, "JPEG", exif=exif),
        "gray.jpg": _encoded(picture.convert("L"), "JPEG"),
        "clear.png": _encoded(picture.convert("RGBA"), "PNG"),
    }


def _encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
