"""A checkpoint of a small detector with random weights, and pictures for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ray_det.models.build import build_detector
from ray_det.models.detector import Detector
from ray_det.train.checkpoint import TrainState
from ray_det.train.job import RunFacts
from ray_det.train.snapshot import Snapshot
from ray_det.types import ClassList
from tests.models.zoo import FAMILIES, spread_scores

CLASSES = ClassList(("disc", "box", "triangle"), (1, 3, 7))


def write_checkpoint(
    folder: Path, family: str = "fcos", seed: int = 0, precision: str = "auto", **data: object
) -> Path:
    torch.manual_seed(seed)
    detector = spread_scores(build_detector(FAMILIES[family], CLASSES)[0])
    return save_checkpoint(detector, family, folder, precision, **data)


def save_checkpoint(detector: Detector, family: str, folder: Path, precision: str = "auto", **data: object) -> Path:
    config = {
        "model": FAMILIES[family].model_dump(),
        "data": {"image_size": 96} | data,
        "train": {"global_batch_size": 4, "precision": precision},
    }
    Snapshot.of(detector, None, TrainState(), RunFacts(config, CLASSES, {}, "id")).write(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def photos(small_coco, tmp_path) -> Path:
    """A folder of JPEGs of mixed sizes, one in a folder of its own, one cut short, one no image at all."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    names = [image["file_name"] for image in json.loads(small_coco["val"].read_text())["images"]]
    for i, name in enumerate(names):
        shutil.copy(small_coco["val"].parent / "images" / name, folder / ("deep" if i == 0 else ".") / name)
    whole = (folder / names[1]).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    (folder / "text.png").write_text("no image")
    return folder
