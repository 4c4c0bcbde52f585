"""Files of an object store whose every answer takes a while: few requests, and many of them at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_det.config import AugmentConfig, DatasetConfig
from ray_det.data import collate, embedded
from ray_det.data.collate import Shard, load
from ray_det.data.headers import scan
from ray_det.data.image import LoadSpec
from ray_det.data.pack import pack
from ray_det.data.parts import WHOLE_BYTES
from ray_det.data.plan import plan_epoch
from ray_det.data.prepare import make
from ray_det.storage import Folder
from ray_det.types import MicroBatch
from tests.data.test_collate import same
from tests.far import far_away

IMAGES = 24
AT_ONCE = 8
LATE_S = 0.1


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    return embedded.generate(tmp_path_factory.mktemp("far"), seed=2, train=IMAGES, val=1, test=1)["train"].parent


@pytest.fixture(scope="module")
def remote(local, s3) -> str:
    Folder.at("s3://bucket/far").upload(local)
    return "s3://bucket/far"


def shard_of(folder: str, packed: str | None = None) -> Shard:
    manifest = make(f"{folder}/train.json", None)[0]
    manifest = pack(manifest, packed, 1 << 30) if packed else manifest
    rows = manifest.trainable_rows()
    h, w = (manifest.table[name].to_numpy()[rows] for name in ("height", "width"))
    shape: dict[str, Any] = {"micro_batches": 2, "micro_batch_size": 4, "divisor": 32, "seed": 5, "epoch": 0}
    plan = plan_epoch(h, w, rows, DatasetConfig(image_size=96), **shape)
    augment = AugmentConfig(mosaic=0.3, mixup=0.2)
    return Shard(manifest, plan.assign(0, 1), LoadSpec("longest", "mean", seed=5, augment=augment))


def are_same(some: list[MicroBatch], others: list[MicroBatch]) -> None:
    for a, b in zip(some, others, strict=True):
        same(a, b)


def test_the_preflight_takes_two_requests_of_an_image_and_many_images_at_once(local, remote, s3, monkeypatch):
    names = sorted(f"images/{path.name}" for path in (local / "images").glob("train*"))
    assert len(names) == IMAGES
    with far_away(s3, monkeypatch, LATE_S) as storage:
        headers = scan(remote, names)
    assert headers == scan(str(local), names)
    assert storage.requests == 2 * IMAGES
    assert storage.most_at_once >= AT_ONCE


@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_file_is_not_taken_whole_for_its_header(progressive, tmp_path, s3, monkeypatch):
    """But for its scans to be counted."""
    name = "large.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / name, quality=95, progressive=progressive)
    assert (tmp_path / name).stat().st_size > 2 * WHOLE_BYTES
    Folder.at("s3://bucket/far_large").upload(tmp_path / name, name)
    with far_away(s3, monkeypatch, 0.0) as storage:
        headers = scan("s3://bucket/far_large", [name])
    assert headers == scan(str(tmp_path), [name]) and headers[0].state == "ok"
    assert storage.requests <= 4 + progressive
    assert progressive or storage.answered_bytes < WHOLE_BYTES


def test_loading_reads_many_files_at_once(local, remote, s3, monkeypatch):
    here = load(shard_of(str(local)))
    shard = shard_of(remote)
    with far_away(s3, monkeypatch, LATE_S) as storage:
        are_same(load(shard), here)
    assert storage.most_at_once >= AT_ONCE


def test_large_files_are_not_read_far_ahead(remote, s3, monkeypatch):
    shard = shard_of(remote)
    largest = max(shard.manifest.table["length"].to_pylist())
    assert largest > 0
    for room, most in ((4, 4), (0, collate.DRAWN_AT_ONCE)):
        monkeypatch.setattr(collate, "READ_AHEAD_BYTES", room * largest)
        plain = Shard(shard.manifest, shard.assignment, LoadSpec("longest", "mean", seed=5, augment=None))
        with far_away(s3, monkeypatch, LATE_S) as storage:
            load(plain)
        assert storage.most_at_once == most


def test_of_a_packed_image_one_request_is_made(local, remote, s3, monkeypatch):
    shard = shard_of(remote, packed="s3://bucket/far_packed")
    plain = Shard(shard.manifest, shard.assignment, LoadSpec("longest", "mean", seed=5, augment=None))
    with far_away(s3, monkeypatch, LATE_S) as storage:
        assert len(load(plain)) == len(plain.assignment)
    assert storage.requests <= len(plain.assignment.rows) + 16  # as many may open the shard at first
    assert storage.most_at_once >= AT_ONCE
