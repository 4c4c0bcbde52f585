"""A checkpoint of a small detector, a real server of it, and pictures of all kinds."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ray_det.train.checkpoint import TrainState
from ray_det.train.job import RunFacts
from ray_det.train.snapshot import Snapshot
from tests.models.zoo import CLASSES, FAMILIES, build, spread_scores
from tests.s3 import free_ports

MAX_BYTES = 1 << 17
ONGOING, QUEUED = 6, 4
CONFIG = {"name": "cells", "model": FAMILIES["fcos"].model_dump(), "data": {"image_size": 160, "max_pixels": 1 << 18}}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Of a detector that finds something everywhere."""
    detector = spread_scores(build("fcos"))
    folder = tmp_path_factory.mktemp("served") / "checkpoint"
    facts = RunFacts(CONFIG, CLASSES, {}, "id")
    Snapshot.of(detector, None, TrainState(global_step=7, best_ap=0.25), facts).write(folder)
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


@pytest.fixture(scope="package")
def url(ray_cluster, checkpoint) -> Iterator[str]:
    from ray import serve

    from ray_det.serve.deployment import application

    (port,) = free_ports(1)
    options = {"max_images": 3, "max_bytes": MAX_BYTES, "batch_wait_s": 0.1, "batch_size": 4}
    options |= {"max_ongoing_requests": ONGOING, "max_queued_requests": QUEUED}
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application({"checkpoint": str(checkpoint), **options}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
