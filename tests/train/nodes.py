"""A Ray cluster of several nodes on this machine, which can lose and get nodes while a job runs on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.jobs.run import JOBS
from tests.ranks import ROOT

WORKER_CPUS = 2
"""CPUs of a worker, and of a node for one: it holds no second worker, and no loader beside the one it has."""

SHORT_HISTORY = {
    "RAY_task_events_max_num_task_in_gcs": "1000",
    "RAY_maximum_gcs_destroyed_actor_cached_count": "100",
}
"""What Ray's server remembers of the past. By default it is so much that it looks like a leak for hours."""


class Nodes:
    """Head without CPUs, where drivers run; a node for loaders; nodes for one train worker each."""

    def __init__(self, workers: int, store_bytes: int) -> None:
        from ray.cluster_utils import Cluster

        self._options: dict[str, Any] = {"object_store_memory": store_bytes, "include_dashboard": False}
        self.cluster = Cluster()
        self.cluster.add_node(num_cpus=0, **self._options)
        self.cluster.add_node(num_cpus=1, **self._options)
        self.workers = [self.add() for _ in range(workers)]

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=WORKER_CPUS, **self._options)

    def remove(self, node: Any) -> None:
        """All its processes get SIGKILL."""
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, deadline_s: int) -> None:
        """Announce a preemption, as a cloud's notice does."""
        deadline = ["--deadline-remaining-seconds", str(deadline_s)]
        what = ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", str(self.cluster.address)]
        subprocess.run([*command, *what, *deadline], check=True, capture_output=True)

    def node_of(self, pid: int) -> Any:
        """The node whose raylet started a process."""
        import psutil

        parents = {process.pid for process in psutil.Process(pid).parents()}
        for node in self.cluster.worker_nodes:
            if any(info.process.pid in parents for infos in node.all_processes.values() for info in infos):
                return node
        raise LookupError(pid)

    def start(self, config_file: Path) -> subprocess.Popen[str]:
        """Start a training job as a driver on the head."""
        command = [sys.executable, "-W", "ignore", str(JOBS / "train.py"), "--config", str(config_file)]
        environment = os.environ | {"RAY_ADDRESS": str(self.cluster.address)}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@contextmanager
def nodes(workers: int, store_bytes: int = 80 << 20) -> Iterator[Nodes]:
    """A cluster beside that of the fixture `ray_cluster`, which has made Ray's token: a process knows one only."""
    before = dict(os.environ)
    os.environ["RAY_memory_monitor_refresh_ms"] = "0"
    os.environ |= SHORT_HISTORY
    made = Nodes(workers, store_bytes)
    try:
        yield made
    finally:
        made.cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)
