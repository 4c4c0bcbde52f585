"""The model of large clusters: its tables are those of docs/scaling.md, and it keeps within its own limits."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest

from ray_det import cli
from ray_det.bench import simulate
from ray_det.bench.scaling import (
    ANYWHERE,
    CHANGED,
    FILES,
    PACKED,
    SPREAD_KEYS,
    Costs,
    all_reduce_s,
    checkpoint_s,
    estimate,
    fits,
    node_memory,
    requests_per_image,
    steady_limits,
    writing_s,
)
from ray_det.types import UserError

ROOT = Path(__file__).resolve().parents[2]
COSTS = Costs()
LAYOUTS = (FILES, PACKED, SPREAD_KEYS, ANYWHERE, CHANGED)
GPUS = (1, 4, 8, 16, 64, 256, 512, 1024)
GRID = list(product(LAYOUTS, GPUS, simulate.IMAGES))


def test_the_document_has_the_tables_that_simulate_prints(capsys):
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert simulate.fill(text, simulate.tables(COSTS)) == text
    assert list(simulate.run(simulate.Config())) == []
    printed = capsys.readouterr().out
    for name, table in simulate.tables(COSTS).items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in text, name
        assert f"{name}\n\n{table}" in printed


def test_a_document_that_cannot_be_filled_is_told_and_left(tmp_path):
    file = tmp_path / "doc.md"
    with pytest.raises(UserError, match=f"--doc {file}: No such file"):
        simulate.run(simulate.Config(doc=str(file)))
    file.write_text("No marks.\n")
    with pytest.raises(UserError, match=f"--doc {file}: there is none of the marks <!-- numbers -->"):
        simulate.run(simulate.Config(doc=str(file)))
    assert file.read_text() == "No marks.\n"
    file.write_text("<!-- CPUs -->\n<!-- end -->\n")  # one is enough
    simulate.run(simulate.Config(doc=str(file)))
    assert "| RetinaNet, H100 |" in file.read_text()


@pytest.mark.parametrize("cpus", [4, 8])
def test_a_node_without_cpus_for_loaders_is_told(cpus):
    with pytest.raises(UserError, match=f"^--node_cpus {cpus}: expected > 8, what the workers of 8 GPUs reserve"):
        cli.parse(simulate.Config, ["--node_cpus", str(cpus)], description="")


def test_the_prose_says_what_fewer_reads_would_need():
    row = simulate.cpus(COSTS.model_copy(update={"loader_reads": 2})).splitlines()[-1]
    needed = row.split(" | ")[2]
    text = " ".join((ROOT / "docs" / "scaling.md").read_text().split())
    assert f"with two at once a RetinaNet on an H100 would need {needed} CPUs" in text


def test_no_epoch_is_faster_than_any_of_its_limits():
    for layout, gpus, images in GRID:
        one = estimate(COSTS, layout, gpus, images)
        assert all(one.images_per_s <= limit for limit in one.limits.values()), (layout, gpus, images)
        assert one.limits["GPUs"] <= gpus * COSTS.gpu_images_per_s
        assert one.epoch_s > sum(one.turnover_s.values())


def test_more_gpus_are_never_slower_while_they_are_what_counts():
    compared = 0
    for layout, images in product(LAYOUTS, simulate.IMAGES):
        row = [estimate(COSTS, layout, gpus, images) for gpus in GPUS]
        for less, more in pairwise(row):
            if more.bottleneck == "GPUs":
                assert more.images_per_s > less.images_per_s, (layout, images)
                compared += 1
    assert compared > 30


def test_what_the_bottleneck_names_is_what_holds_the_epoch_up():
    """Without it, the epoch is shorter by a tenth at least."""
    named = set()
    for layout, gpus, images in GRID:
        one = estimate(COSTS, layout, gpus, images)
        if one.bottleneck in one.turnover_s:
            without = replace(one, turnover_s=one.turnover_s | {one.bottleneck: 0.0})
        elif one.bottleneck != "GPUs":
            lowest, *_ = sorted(one.limits.values())
            without = replace(one, steps_s=one.steps_s * lowest / one.limits["GPUs"])
        else:
            continue
        named.add(one.bottleneck)
        assert without.epoch_s <= 0.9 * one.epoch_s, (layout, gpus, images)
    assert {"store's requests", "blocks between nodes", "first batch"} <= named


def test_an_epoch_by_hand():
    """Two GPUs of one node that all-reduce in no time, 100 images in batches of 8: seven steps of 16."""
    costs = Costs(
        gpu_images_per_s=80,
        batch=8,
        step_spread=1e-12,
        nvlink_gb_s=1e12,
        hop_s=1e-12,
        plan_s=0.01,
        first_batch_s=0.25,
        model_params=1e9,
    )
    one = estimate(costs, FILES, 2, 100)
    assert one.steps_s == pytest.approx(7 * 0.1)
    assert one.turnover_s["plan"] == pytest.approx(1.0)
    assert one.turnover_s["checkpoint"] == pytest.approx(12 / 10)
    assert one.images_per_s == pytest.approx(100 / (0.7 + 1 + 0.25 + 1.2))
    assert one.bottleneck == "checkpoint"


def test_all_reduce_by_hand():
    costs = Costs(nvlink_gb_s=100, fabric_gb_s=10, hop_s=0.001)
    assert all_reduce_s(costs, 1, 1e9) == 0
    assert all_reduce_s(costs, 8, 1e9) == pytest.approx(2 * 7 / 8 / 100 + 2 * 3 * 0.001)
    assert all_reduce_s(costs, 16, 1e9) == pytest.approx(2 * 15 / 16 / 10 + 2 * 4 * 0.001)


def test_requests_and_memory_follow_the_data():
    assert requests_per_image(COSTS, FILES, 10**7) == 2
    assert requests_per_image(COSTS, PACKED, 10**5) == 1  # all of its shards stay open
    assert 1.99 < requests_per_image(COSTS, PACKED, 10**9) < 2
    for layout in LAYOUTS:
        small, large = (node_memory(COSTS, layout, 64, n) for n in (10**6, 10**9))
        assert {k: v * 1000 for k, v in small.items()} == pytest.approx(large)
    assert fits(COSTS, node_memory(COSTS, FILES, 64, 10**8))
    assert not fits(COSTS, node_memory(COSTS, FILES, 64, 2 * 10**9))
    assert fits(COSTS, node_memory(COSTS, CHANGED, 64, 2 * 10**9))


def test_only_what_is_loaded_elsewhere_moves_between_nodes():
    for layout, gpus, moves in ((ANYWHERE, 8, False), (ANYWHERE, 16, True), (FILES, 16, False)):
        assert (steady_limits(COSTS, layout, gpus, 10**6)["blocks between nodes"] < math.inf) is moves


def test_a_checkpoint_is_written_longer_than_it_is_copied():
    assert writing_s(COSTS, 1e9) == pytest.approx(12 / 1 + 12 / 1.8 + 12 / 0.2)
    assert checkpoint_s(COSTS, 1e9) < writing_s(COSTS, 1e9)


def test_numbers_that_stand_in_the_code():
    from ray_det.data import files, pipeline

    assert COSTS.loader_reads == files.READS_AT_ONCE
    assert COSTS.block_bytes == pipeline.BLOCK_BYTES
    assert COSTS.open_shards == files._opened.cache_parameters()["maxsize"]


COUNT = """
import os, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

content, seen = bytes(range(100)), []

class Store(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def do_HEAD(self):
        seen.append(self.command)
        first, last = 0, 99
        if asked := self.headers.get("Range"):
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Content-Range", f"bytes {first}-{last}/100")
        self.send_header("Last-Modified", "Mon, 02 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[first : last + 1])
    do_GET = do_HEAD

server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
from ray_det.data import files
assert files.read_bytes("s3://bucket/a.jpg", 1000) == content
assert files.read_range("s3://bucket/shard", 10, 20) == content[10:30]
assert files.read_range("s3://bucket/shard", 30, 20) == content[30:50]
print(*seen)
"""


def test_requests_are_those_that_a_store_gets():
    """A HEAD and a GET for a file; for a shard, a HEAD once and a GET for every image."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env=os.environ | keys, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["HEAD", "GET", "HEAD", "GET", "GET"], done.stderr
