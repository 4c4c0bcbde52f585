"""What a session makes of its configuration: the plan of an epoch, and how its images are loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ray_det.bench.alone import open_alone
from ray_det.config import TrainJobConfig
from ray_det.data.collate import load
from ray_det.data.headers import map_in_threads
from ray_det.data.plan import resized, round_up
from ray_det.train.session import Session
from ray_det.train.start import begin
from tests.models.zoo import FAMILIES


@pytest.fixture(scope="module")
def session(small_coco: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Of a data set whose first images cannot be read, with everything on."""
    folder = tmp_path_factory.mktemp("session")
    shutil.copytree(small_coco["train"].parent, folder / "coco")
    for name in ("train_0001.jpg", "train_0004.jpg"):
        (folder / "coco" / "images" / name).write_bytes(b"no image")
    config = TrainJobConfig.model_validate(
        {
            "storage": str(folder / "runs"),
            "data": {"train": str(folder / "coco" / "train.json"), "image_size": 640}
            | {"sampling": "repeat_factor", "repeat_threshold": 1},
            "augment": {"mosaic": 0.5, "mixup": 0.2, "copy_paste": 0.1, "iou_crop": 0.3, "close_mosaic": 3},
            "model": FAMILIES["fcos"].model_dump(),
            "train": {"epochs": 8, "global_batch_size": 4},
            "wandb": {"mode": "disabled"},
        }
    )
    return open_alone(begin(config, 0.0, lambda text: None, map_in_threads), 1, lambda work: iter(load(work)))


def test_canvases_are_those_of_the_images_that_are_on_them(session):
    """Also where images before them are not trained on."""
    table, plan = session.job.manifests["train"].table, session.plan(0)
    assert not table["trainable"][0].as_py() and set(np.unique(plan.rows_SMB)) == set(np.delete(np.arange(16), [0, 3]))
    for rows, canvas in zip(plan.rows_SMB.reshape(plan.steps, -1), plan.canvas_S2, strict=True):
        heights, widths = (table[name].to_numpy()[rows] for name in ("height", "width"))
        expected = round_up(resized(heights, widths, 640, "longest").max(axis=0), session.detector.size_divisor)
        assert np.array_equal(canvas, expected)


def test_the_configured_sampling_is_the_plans(session):
    images = session._sampler.images
    assert len(session._sampler.factors_N) == 14 < images - 4 and session._sampler is session._sampler
    assert {session.plan(epoch).steps for epoch in range(5)} == {-(-images // 4)}


def test_the_last_epochs_are_loaded_without_composing(session):
    state = session.state
    try:
        for epoch in range(8):
            session.state = replace(state, epoch=epoch)
            spec = session.load_spec(training=True)
            assert spec.augment is not None and spec.augment.flip == 0.5
            shares = [getattr(spec.augment, name) for name in ("mosaic", "mixup", "copy_paste", "iou_crop")]
            assert shares == ([0.5, 0.2, 0.1, 0.3] if epoch < 5 else [0, 0, 0, 0])
            assert session.load_spec(training=False).augment is None
    finally:
        session.state = state
