"""What tests of all rooms share."""

import logging
import os
from pathlib import Path

import pytest
import torch

from ray_det.data import embedded
from tests.s3 import s3_server

os.environ.setdefault("WANDB_SILENT", "true")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small models gain nothing from more torch threads, and lose much where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_coco(tmp_path_factory) -> dict[str, Path]:
    """A small COCO data set of many sizes: JSON paths by split."""
    return generate_small_coco(tmp_path_factory.mktemp("small_coco"))


def generate_small_coco(folder: Path) -> dict[str, Path]:
    return embedded.generate(folder, seed=1, train=16, val=7, test=5)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real data sets, from RAY_DET_REAL_DATA."""
    folder = os.environ.get("RAY_DET_REAL_DATA")
    if not folder:
        pytest.skip("RAY_DET_REAL_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real S3 server; `s3://bucket/…` is on it. Who stops it starts it again."""
    with s3_server(tmp_path_factory.mktemp("s3") / "server") as running:
        yield running


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """One Ray for all tests that need one. Its home is temporary: Ray writes a token there."""
    import ray

    from ray_det.connect import prepare_environment

    old_home = os.environ.get("HOME")
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    prepare_environment()
    ray.init("local", num_cpus=5, log_to_driver=False, logging_level=logging.ERROR, object_store_memory=300 << 20)
    yield
    ray.shutdown()
    if old_home:
        os.environ["HOME"] = old_home
