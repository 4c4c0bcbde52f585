"""The Ray Data pipeline gives exactly what a plain call gives, in order."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from ray_det.config import DatasetConfig
from ray_det.data import collate
from ray_det.data.collate import LoadSpec, Shard
from ray_det.data.manifest import Manifest
from ray_det.data.plan import Assignment, plan_epoch
from ray_det.data.prepare import make
from ray_det.storage import StorageError
from ray_det.types import UserError
from tests.data.test_collate import TRAIN, manifest, plan_of, same  # noqa: F401  the fixture
from tests.ranks import ROOT

pytestmark = pytest.mark.ray


def gone(manifest: Manifest) -> Manifest:  # noqa: F811
    """All of its images are."""
    names = manifest.table["uri"].to_pylist()
    return replace(manifest, table=manifest.table.set_column(1, "uri", [[f"gone/{n}" for n in names]]))


@pytest.mark.usefixtures("ray_cluster")
def test_stream_is_load_in_order(manifest):  # noqa: F811
    from ray_det.data.pipeline import Loaders

    work = collate.Shard(manifest, plan_of(manifest).assign(1, 2), TRAIN)
    streamed = list(Loaders(2).stream(work))
    for one, other in zip(streamed, collate.load(work), strict=True):
        same(one, other)
    assert [b.step for b in streamed] == list(range(len(streamed)))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("most", "cpus"), [(2, 2), (3, 5), (100, 3)])  # an epoch has fewer than 100 micro-batches
def test_what_was_expected_is_load_in_order_too(manifest, monkeypatch, most, cpus):  # noqa: F811
    from ray_det.data import pipeline

    monkeypatch.setattr(pipeline, "BLOCK_BATCHES", most)
    shards = [Shard(manifest, plan_of(manifest, epoch).assign(0, 2), TRAIN) for epoch in range(4)]
    loaders = pipeline.Loaders(cpus)
    # Not all of it is asked for, and what is, in any order.
    for others in (
        [shards[0]],
        shards[:2],
        [shards[3]],
        [shards[2], shards[0]],
    ):
        loaders.expect(others)
        assert len(loaders._expected) == len(others)
        for work in (others[-1], shards[1]):
            for one, other in zip(loaders.stream(work), collate.load(work), strict=True):
                same(one, other)


@pytest.mark.usefixtures("ray_cluster")
def test_what_was_expected_is_loaded_before_it_is_asked_for(small_coco, tmp_path):
    import ray

    from ray_det.data.pipeline import BLOCK_BATCHES, Loaders

    folder = tmp_path / "coco"
    shutil.copytree(small_coco["train"].parent, folder)
    images = make(str(folder / "train.json"), None)[0]
    loaders, work = Loaders(2), Shard(images, plan_of(images).assign(0, 1), TRAIN)
    before = collate.load(work)
    assert len(before) <= BLOCK_BATCHES
    loaders.expect([work])
    ray.get([task.completed() for task in loaders._expected[0].tables], timeout=60)
    shutil.rmtree(folder)
    for one, other in zip(loaders.stream(work), before, strict=True):
        same(one, other)


@pytest.mark.usefixtures("ray_cluster")
def test_a_broken_image_that_was_expected_names_itself(manifest):  # noqa: F811
    from ray_det.data.pipeline import Loaders

    loaders, work = Loaders(2), Shard(gone(manifest), plan_of(manifest).assign(0, 1), TRAIN)
    loaders.expect([work])
    with pytest.raises(UserError, match="gone/"):
        list(loaders.stream(work))


@pytest.mark.usefixtures("ray_cluster")
def test_a_manifest_goes_to_the_object_store_once(manifest, monkeypatch):  # noqa: F811
    import ray

    from ray_det.data.pipeline import Loaders

    loaders, put, puts = Loaders(2), ray.put, []
    monkeypatch.setattr(ray, "put", lambda value: puts.append(value) or put(value))
    for epoch in range(2):
        plan = plan_of(manifest, epoch)
        assert len(list(loaders.stream(collate.Shard(manifest, plan.assign(0, 1), TRAIN)))) == 2 * plan.steps
    assert [value for value in puts if value is manifest] == [manifest]


@pytest.mark.usefixtures("ray_cluster")
def test_epochs_share_a_name_and_streams_at_the_same_time_do_not(manifest):  # noqa: F811
    """Ray's metrics never forget a name: with one per epoch they grow for as long as a run lasts."""
    import ray
    from ray.data._internal.stats import get_or_create_stats_actor

    from ray_det.data.pipeline import Loaders

    def names() -> set[str]:
        return set(ray.get(get_or_create_stats_actor().get_datasets.remote()))

    loaders, before = Loaders(2), names()
    shards = [collate.Shard(manifest, plan_of(manifest, epoch).assign(0, 1), TRAIN) for epoch in range(3)]
    for shard in shards:
        assert len(list(loaders.stream(shard))) == len(shard.assignment)
    assert len(names() - before) == 1
    first, second = loaders.stream(shards[0]), loaders.stream(shards[1])
    assert (next(first).epoch, next(second).epoch) == (0, 1)
    assert len(names() - before) == 2
    assert len(list(first)) + len(list(second)) == len(shards[0].assignment) + len(shards[1].assignment) - 2


WAKING = """
import pickle, sys
wake = pickle.loads(sys.stdin.buffer.read())
assert "ray.data" not in sys.modules
wake(None)
assert {"ray.data", "cv2"} <= sys.modules.keys() and "torch" not in sys.modules
"""


def test_a_process_that_was_woken_has_imported_what_loading_needs():
    """A second, which the first batch would wait for."""
    import ray.cloudpickle

    from ray_det.data.pipeline import wake

    sent = cast(Any, ray.cloudpickle).dumps(cast(Any, wake)._function)
    done = subprocess.run([sys.executable, "-c", WAKING], input=sent, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_blocks_are_small_at_first_and_bounded():
    from ray_det.data.pipeline import BLOCK_BATCHES, BLOCK_BYTES, _blocks

    n = 40
    keys = np.stack([np.zeros(n), np.arange(n), np.zeros(n)], axis=1).astype(np.int32)
    canvas = np.where(np.arange(n)[:, None] < 25, 640, 2048).astype(np.int32).repeat(2, axis=1)
    whole = Assignment(keys, canvas, np.full(n, 640, np.int32), np.arange(n + 1) * 4, *[np.arange(4 * n)] * 2)
    blocks = list(_blocks(whole))
    assert np.array_equal(np.concatenate([block.keys for block in blocks]), keys)
    assert np.array_equal(np.concatenate([block.rows for block in blocks]), whole.rows)
    assert [len(block) for block in blocks][:4] == [1, 2, 4, BLOCK_BATCHES]
    assert max(4 * int(block.canvas.prod(axis=1).sum()) * 3 for block in blocks) <= BLOCK_BYTES
    alone = Assignment(keys[:2], canvas[:2] * 8, keys[:2, 0], whole.offsets[:3], whole.rows[:8], whole.rows[:8])
    assert [len(block) for block in _blocks(alone)] == [1, 1]  # each is larger than that, and goes all the same


@pytest.mark.usefixtures("ray_cluster")
def test_a_broken_image_names_itself(manifest):  # noqa: F811
    from ray_det.data.pipeline import Loaders

    with pytest.raises(UserError, match="gone/"):
        list(Loaders(2).stream(Shard(gone(manifest), plan_of(manifest).assign(0, 1), TRAIN)))


@pytest.mark.usefixtures("ray_cluster")
def test_map_chunks_keeps_the_order():
    from ray_det.data.ray_map import ray_map_chunks

    assert ray_map_chunks(lambda chunk: int(np.sum(chunk)), [[1, 2], [3], [4, 5]]) == [3, 3, 9]


@pytest.mark.usefixtures("ray_cluster")
def test_what_ends_a_chunk_is_one_line():
    from ray_det.data.ray_map import ray_map_chunks

    def refused(chunk: int) -> None:
        raise StorageError("cannot read s3://bucket/a.jpg: ACCESS_DENIED")

    with pytest.raises(StorageError, match="^cannot read s3://bucket/a.jpg: ACCESS_DENIED$"):
        ray_map_chunks(refused, [1, 2])


SMALL_STORE = """
import logging, sys
from pathlib import Path
import ray
from ray_det.connect import prepare_environment
from ray_det.data.pipeline import Loaders
from tests.data.test_pipeline import large_batches
from ray_det.data.collate import load
prepare_environment()
quiet = dict(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
ray.init("local", num_cpus=3, object_store_memory=80 << 20, **quiet)
loaders, works = Loaders(2), [large_batches(Path(sys.argv[1])) for _ in range(3)]
loaders.expect(works[1:])
for work in works:
    for i, batch in enumerate(loaders.stream(work)):
        (expected,) = load(work, i, i + 1)
        assert (batch.pixels_BHW3 == expected.pixels_BHW3).all(), i
    print(i + 1, batch.pixels_BHW3.nbytes >> 20)
"""


def large_batches(json_path: Path) -> Shard:
    """Micro-batches of which an object store of 80 MB holds one, and a part of the next."""
    images, _ = make(str(json_path), None)
    table, config = images.table, DatasetConfig(image_size=1600, resize="square")
    sizes = table["height"].to_numpy(), table["width"].to_numpy()
    rows = np.flatnonzero(table["trainable"].to_numpy())
    plan = plan_epoch(*sizes, rows, config, micro_batches=1, micro_batch_size=7, divisor=32, seed=0, epoch=0)
    return Shard(images, plan.assign(0, 1), LoadSpec("square", "mean", seed=0, augment=None))


@pytest.mark.ray
@pytest.mark.slow
def test_an_object_store_of_80_mb_is_enough(small_coco, tmp_path):
    environment = os.environ | {"HOME": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", SMALL_STORE, str(small_coco["train"])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "51"] * 3
