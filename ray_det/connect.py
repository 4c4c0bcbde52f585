"""Ray under a job: connect to a cluster, or start one on this machine and end it."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import psutil
import ray
from ray._private import auto_init_hook, ray_constants
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

from ray_det.config import WorkersConfig
from ray_det.types import UserError

ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment as it is
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for this poll
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would come twice
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it closes all handlers of the driver's logging
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's new default, without the warning
    "RAY_COLOR_PREFIX": "0",  # its warnings are coloured in files too
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # of 30 seconds that a spot node may have
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train says so to its own processes
}
LOCALLY = {
    "RAY_worker_niceness": "0",  # Ray's 15 holds from a process's first task on: those that start stall all others
    "RAY_prestart_worker_first_driver": "0",  # processes without Ray Train's settings, which nobody takes
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away
    "MALLOC_ARENA_MAX": "1",  # training runs in a thread, whose own arena gives large blocks back: see keep_memory
    "RAY_task_events_report_interval_ms": "0",  # no dashboard shows them, and Ray's server remembers 100,000 tasks
}
END_S = 3.0
"""For Ray's processes to end by themselves once the driver has."""
NODE_S = 30.0
"""For a node to be there, as Ray waits itself."""
UNUSED_LOCALLY = ("start_api_server", "start_monitor", "start_log_monitor")
"""Python processes that Ray starts, and in part waits for, which a run on one machine has no use for: a dashboard
without pages, an autoscaler without machines, logs for a driver that does not take them. What Ray renames stays."""
ELASTIC_START_S = 10.0
"""A range of workers is placed at once or not at all: Ray may still count a node that is gone, and must look again."""


def connect() -> bool:
    """Connect to the cluster that RAY_ADDRESS names; -> False: it names none.

    Raises:
        UserError: it cannot be reached, or refuses the token.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return False
    prepare_environment()
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(f"RAY_ADDRESS {address}: {_innermost(error)}") from None
    return True


def start_here(cpus: int) -> None:
    """Start Ray on this machine, for as long as this process lives.

    Args:
        cpus: that Ray counts.
    """
    prepare_environment()
    for name, value in LOCALLY.items():
        os.environ.setdefault(name, value)
    with _quicker():
        ray.init(
            "local",  # a cluster that happens to run here is another's
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    atexit.register(end)  # before Ray's own


def end() -> None:
    """Leave Ray. What of it was started here ends, or is killed: now and then a process of Ray 2.60 waits for itself
    for ever.
    """
    processes: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has ended
            if child.name() in ("gcs_server", "raylet"):
                processes += [child, *child.children(recursive=True)]
    auto_init_hook.enable_auto_connect = False  # a thread that still controls a run would start Ray anew
    ray.shutdown()
    _, left = psutil.wait_procs(processes, timeout=END_S)
    for process in left:
        with suppress(psutil.Error):
            process.kill()


def _innermost(error: BaseException) -> str:
    """The cause of the causes: Ray's outer errors do not say what was wrong. Its last line: it may hold a traceback."""
    while error.__cause__:
        error = error.__cause__
    return str(error).strip().splitlines()[-1]


@contextmanager
def _quicker() -> Iterator[None]:
    """Ray's nodes start without `UNUSED_LOCALLY`, and are seen as soon as they are there: a second or two of every
    start, and memory.
    """
    from ray._private import services
    from ray._private.node import Node

    unused = {name: lambda self, **options: None for name in UNUSED_LOCALLY}
    get_node = partial(_get_node, getattr(services, "get_node", None))
    with replaced(Node, unused), replaced(services, {"get_node": get_node}):
        yield


@contextmanager
def replaced(owner: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """For a while, those that the owner has."""
    known = {name: getattr(owner, name) for name in attributes if hasattr(owner, name)}
    try:
        for name in known:
            setattr(owner, name, attributes[name])
        yield
    finally:
        for name, attribute in known.items():
            setattr(owner, name, attribute)


def _get_node(get_node: Any, gcs_address: str, node_id: str) -> Any:
    """What Ray's `get_node` gives, which sleeps for a second where the node is not there yet."""
    client, deadline = GcsClient(address=gcs_address), time.monotonic() + NODE_S
    while time.monotonic() < deadline and not any(node.hex() == node_id for node in client.get_all_node_info()):
        time.sleep(0.05)
    return get_node(gcs_address, node_id)


def prepare_environment() -> None:
    """Settings that Ray reads when it starts; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray has read this one when it was imported.
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] != "0"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of Ray's processes would compile its imports anew


def set_limits(workers: WorkersConfig) -> None:
    """Limits that Ray Train takes from the environment of the process that calls `fit`."""
    # A rank's own watch, which knows more, speaks first.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(workers.stall_timeout_s + 5)
    start_s = workers.start_timeout_s
    if workers.least < workers.most:
        start_s = min(start_s, ELASTIC_START_S)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_s)
