"""A Ray cluster as operators start it: `ray start` for head and workers, with a token, and `ray job` beside it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from tests.cluster.provider import Provider
from tests.ranks import ROOT
from tests.s3 import free_ports

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")
SUBMIT = str(ROOT / "cluster" / "scripts" / "submit.sh")


@dataclass(frozen=True)
class Running:
    """Where it is, for whoever has the token."""

    client: dict[str, str]  # the environment of a machine from which jobs are sent
    gcs: str  # address for nodes and drivers
    metrics_ports: list[int]  # by node, the head first
    sessions: list[Path]  # folders of logs and of packages, by node
    pids: list[int]  # of `ray start`, by node

    def ray(self, *arguments: str, timeout_s: float = 300) -> str:
        """What `ray …` says, on both streams."""
        return _said([RAY, *arguments], self.client, timeout_s)

    def submit(self, *arguments: object, timeout_s: float = 300) -> str:
        """What `cluster/scripts/submit.sh …` says."""
        return _said([SUBMIT, *map(str, arguments)], self.client, timeout_s)

    def run(self, *command: str, **environment: str) -> str:
        """What a program says that runs on a node."""
        return _said(list(command), self.client | environment, 300)

    def metrics(self) -> list[str]:
        """Lines of the metrics endpoints of all nodes that answer."""
        texts: list[str] = []
        for port in self.metrics_ports:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                texts.append(answer.read().decode())
        return "\n".join(texts).splitlines()


@contextmanager
def cluster(folder: Path, workers: int, cpus: int, *, may_add: int = 0) -> Iterator[Running]:
    """A head without CPUs and workers with some, with token authentication, on ports of their own.

    Args:
        folder: for logs, and home of all processes.
        cpus: of each worker.
        may_add: workers that an autoscaler may add: Ray's own, with processes of this machine for its machines.
    """
    port, dashboard = free_ports(2)
    # Short paths, for Ray makes sockets there; one for each node, for each unpacks a job's package, and removes it.
    temporary = [mkdtemp(prefix="ray") for _ in range(workers + 1)]
    own = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name == "RAY_DET_REAL_DATA"
    }
    own |= {"HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    own |= {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_memory_monitor_refresh_ms": "0"}
    client = own | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    head = ["--head", "--port", str(port), "--dashboard-port", str(dashboard), "--num-cpus", "0"]
    if may_add:
        own |= {
            "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "PYTHONPATH": str(ROOT),
        }
        own |= {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
        (folder / "autoscaling.json").write_text(
            json.dumps(_autoscaling(f"127.0.0.1:{port}", temporary[0], cpus, may_add))
        )
        head += ["--autoscaling-config", str(folder / "autoscaling.json")]
    metrics = free_ports(workers + 1)
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        nodes.append(_start(folder / "head.log", [*head, *_ports(metrics[0]), "--temp-dir", temporary[0]], own))
        _wait_for(client, nodes[0], folder / "head.log")
        for i in range(workers):
            worker = [f"--address=127.0.0.1:{port}", "--num-cpus", str(cpus), *_ports(metrics[i + 1])]
            worker += ["--temp-dir", temporary[i + 1]]
            nodes.append(_start(folder / f"worker{i}.log", worker, own))
        sessions = [Path(place, "session_latest") for place in temporary]
        yield Running(client, f"127.0.0.1:{port}", metrics, sessions, [node.pid for node in nodes])
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait(timeout=120)
        for place in temporary:
            shutil.rmtree(place, ignore_errors=True)


def _autoscaling(address: str, folder: str, cpus: int, most: int) -> dict[str, Any]:
    provider = {"type": "external", "module": f"{Provider.__module__}.{Provider.__name__}", "folder": folder}
    provider |= {"launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID}
    worker = {"resources": {"CPU": cpus, "object_store_memory": 150 << 20}, "node_config": {}, "max_workers": most}
    return {
        "cluster_name": "test",
        "provider": provider | {"gcs_address": address},
        "max_workers": most,
        "idle_timeout_minutes": 0.5,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": worker | {"min_workers": 0},
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{name}_commands": [] for name in ("setup", "head_setup", "worker_setup", "initialization")},
        **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
    }


def _ports(metrics: int) -> list[str]:
    agent, grpc = map(str, free_ports(2))
    names = ("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--metrics-export-port")
    return [text for pair in zip(names, (agent, grpc, str(metrics)), strict=True) for text in pair]


def _start(log: Path, options: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    small = ["--object-store-memory", str(150 << 20), "--disable-usage-stats", "--block"]
    with log.open("w") as file:
        return subprocess.Popen(
            [RAY, "start", *options, *small], env=environment, cwd=log.parent, stdout=file, stderr=file
        )


def _wait_for(client: dict[str, str], head: subprocess.Popen[bytes], log: Path) -> None:
    while subprocess.run([RAY, "job", "list"], env=client, capture_output=True, timeout=120).returncode:
        assert head.poll() is None, log.read_text()
        time.sleep(1)


def _said(command: list[str], environment: dict[str, str], timeout_s: float) -> str:
    done = subprocess.run(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    return done.stdout
