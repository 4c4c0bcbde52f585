"""Pixels are made on the node that trains on them, as long as it has CPUs free."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.ranks import ROOT

CLUSTER = """
import json, logging, sys
import ray
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_det.config import DatasetConfig
from ray_det.connect import prepare_environment
from ray_det.data.collate import LoadSpec, Shard
from ray_det.data.pipeline import Loaders
from ray_det.data.plan import plan_epoch
from ray_det.data.prepare import make

prepare_environment()
cluster = Cluster()
options = {"object_store_memory": 200 << 20, "include_dashboard": False}
cluster.add_node(num_cpus=0, **options)
nodes = [cluster.add_node(num_cpus=2, **options) for _ in range(2)]
ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
here = NodeAffinitySchedulingStrategy(nodes[0].node_id, soft=False)

def made_elsewhere():
    "Bytes: what another node fetches is made again there, but nobody fetches anything to the second one."
    (where,) = [n for n in ray.nodes() if n["NodeID"] == nodes[1].node_id]
    return node_stats(where["NodeManagerAddress"], where["NodeManagerPort"]).store_stats.cumulative_created_bytes

@ray.remote(num_cpus=0, scheduling_strategy=here)
class Rank:
    def load(self, path):
        table = (images := make(path, None)[0]).table
        sizes, rows = (table["height"].to_numpy(), table["width"].to_numpy()), images.trainable_rows()
        config, loaders, total = DatasetConfig(image_size=640, resize="square"), Loaders(2), 0
        sizes = [side[rows] for side in sizes]
        for epoch in range(3):
            shape = dict(micro_batches=1, micro_batch_size=2, divisor=32)
            plan = plan_epoch(*sizes, rows, config, **shape, seed=0, epoch=epoch)
            spec = LoadSpec("square", "mean", seed=0, augment=None)
            shard = Shard(images, plan.assign(0, 1), spec)
            if epoch:  # all of it before it is asked for
                loaders.expect([shard])
            total += sum(b.pixels_BHW3.nbytes for b in loaders.stream(shard))
        return total

@ray.remote(num_cpus=2, scheduling_strategy=here)
class Busy:
    pass

def load():
    before = made_elsewhere()
    total = ray.get(Rank.remote().load.remote(sys.argv[1]))
    return [total, made_elsewhere() - before]

free = load()
busy = Busy.remote()
ray.get(busy.__ray_ready__.remote())
print(json.dumps([free, load()]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_loaders_are_on_their_ranks_node_while_it_has_room_and_elsewhere_when_not(small_coco, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", CLUSTER, str(small_coco["train"])]
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    (total, elsewhere), (again, all_elsewhere) = json.loads(done.stdout.splitlines()[-1])
    assert total == again > 40e6
    assert elsewhere < 0.1 * total
    assert all_elsewhere > total
