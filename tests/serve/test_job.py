"""`python jobs/serve.py`: what it refuses, what it measures, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import psutil
import pytest
import requests

import ray_det
from tests.jobs.run import JOBS, run_job
from tests.models.zoo import CLASSES
from tests.s3 import free_ports
from tests.serve.same import require_same


def test_what_cannot_be_served_is_said_at_once(checkpoint, tmp_path, capfd):
    def refused(*arguments: object) -> str:
        assert run_job("serve", *arguments) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        return line

    assert "no such checkpoint" in refused("--checkpoint", tmp_path / "nothing")
    assert "--checkpoint is required" in refused()
    assert "no room for 2 replicas with 999 CPUs" in refused("--checkpoint", checkpoint, "--replicas", 2, "--cpus", 999)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("--checkpoint", checkpoint, "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in line and "in use" in line


@contextmanager
def job(checkpoint: Path, home: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, the URL and that of its metrics, once it serves."""
    (port,) = free_ports(1)
    command = [sys.executable, "-W", "ignore", JOBS / "serve.py", "--checkpoint", checkpoint, "--port", port, *options]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"HOME": str(home)}
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        assert process.stdout
        said = "".join(islice(process.stdout, 2))
        found = re.fullmatch(r"serving .* at (http://127.0.0.1:\d+)/\nmetrics at (http\S+)\n", said)
        assert found, said + process.stdout.read()
        yield process, found[1], found[2]
    finally:
        process.kill()
        process.wait()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_end_and_leaves_no_process(checkpoint, pictures, tmp_path, number):
    """The requests wait in a batch that is not full when the signal comes."""
    with job(checkpoint, tmp_path, "--batch_wait_s", 3, "--batch_size", 8) as (process, url, _):
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > 3
        with ThreadPoolExecutor(3) as pool:
            asked = [
                pool.submit(requests.post, f"{url}/predict", data=pictures["gray.jpg"], timeout=60) for _ in range(3)
            ]
            time.sleep(1)
            process.send_signal(number)
            assert [reply.result().status_code for reply in asked] == [200] * 3
        assert process.wait(timeout=60) == 128 + number
        gone, alive = psutil.wait_procs(family, timeout=10)
        assert alive == [] and len(gone) == len(family)
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=10)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_a_killed_job_leaves_no_process(checkpoint, pictures, tmp_path):
    with job(checkpoint, tmp_path) as (process, url, _):
        family = psutil.Process(process.pid).children(recursive=True)
        (replica,) = [one for one in family if "ServeReplica" in " ".join(one.cmdline())]
        replica.kill()
        deadline = time.monotonic() + 90
        while requests.post(f"{url}/predict", data=pictures["gray.jpg"], timeout=90).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(family, timeout=120)  # Ray's agents look once a minute
        assert alive == []


@pytest.mark.ray
@pytest.mark.slow
def test_metrics_and_two_replicas(checkpoint, pictures, tmp_path):
    """Counts of both replicas, as Prometheus reads them; names are Ray's prefix and ours."""
    with job(checkpoint, tmp_path, "--replicas", 2, "--max_ongoing_requests", 2) as (_, url, metrics):
        detector = ray_det.load(str(checkpoint), device="cpu")
        wanted = {name: detector.predict([content])[0] for name, content in pictures.items()}
        names = [*pictures] * 5
        with ThreadPoolExecutor(4) as pool:
            replies = pool.map(lambda name: requests.post(f"{url}/predict", data=pictures[name], timeout=60), names)
        for name, reply in zip(names, replies, strict=True):
            require_same(reply.json()["images"][0], wanted[name], CLASSES, rtol=1e-5)
        assert requests.post(f"{url}/predict", data=b"no", timeout=60).status_code == 400
        deadline = time.monotonic() + 60
        while not (seen := counts(metrics)).get("refused_total{400}") or seen.get("images_total", 0) < len(names):
            assert time.monotonic() < deadline, seen
            time.sleep(1)
        assert seen["images_total"] == len(names)
        assert seen["decode_s_count"] == len(names) and 0 < seen["forward_s_count"] == seen[
            "forward_images_count"
        ] <= len(names)
        assert seen["detections_total"] == sum(len(wanted[name].scores_N) for name in names)
        assert seen["replicas"] == 2


def counts(metrics: str) -> dict[str, float]:
    """Sums over replicas of what is named det_serve_…, and how many replicas there are."""
    found: dict[str, float] = {}
    replicas = set()
    for name, labels, value in re.findall(
        r"^ray_det_serve_(\w+)\{(.*)\} (\S+)$", requests.get(metrics, timeout=30).text, re.MULTILINE
    ):
        if status := re.search(r'status="(\d+)"', labels):
            name = f"{name}{{{status[1]}}}"
        found[name] = found.get(name, 0) + float(value)
        replicas |= set(re.findall(r'replica="(\w+)"', labels))
    return found | {"replicas": len(replicas)}
