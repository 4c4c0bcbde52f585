"""The Ray Data pipeline gives exactly what a plain call gives, in order."""

import numpy as np
import pytest

from ray_det.data import collate
from ray_det.types import UserError
from tests.data.test_collate import TRAIN, manifest, plan_of, same  # noqa: F401  the fixture

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("ray_cluster")
def test_stream_is_load_in_order(manifest):  # noqa: F811
    from ray_det.data.pipeline import stream

    work = collate.shard(manifest, plan_of(manifest).assign(1, 2), TRAIN)
    streamed = list(stream(work))
    for one, other in zip(streamed, collate.load(work), strict=True):
        same(one, other)
    assert [b.step for b in streamed] == list(range(len(streamed)))


@pytest.mark.usefixtures("ray_cluster")
def test_a_broken_image_names_itself(manifest, small_coco):  # noqa: F811
    from dataclasses import replace

    from ray_det.data.pipeline import stream

    names = manifest.table["uri"].to_pylist()
    broken = replace(manifest, table=manifest.table.set_column(1, "uri", [[f"gone/{n}" for n in names]]))
    with pytest.raises(UserError, match="gone/"):
        list(stream(collate.shard(broken, plan_of(manifest).assign(0, 1), TRAIN)))


@pytest.mark.usefixtures("ray_cluster")
def test_map_chunks_keeps_the_order():
    from ray_det.data.pipeline import ray_map_chunks

    assert ray_map_chunks(lambda chunk: int(np.sum(chunk)), [[1, 2], [3], [4, 5]]) == [3, 3, 9]
