"""The Ray cluster under a job: connect to it or start one on this machine, and see what fits on it."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray._private import ray_constants

from ray_det.config import WorkersConfig
from ray_det.types import UserError

if TYPE_CHECKING:
    from ray.train import ScalingConfig
    from ray.util.placement_group import PlacementGroup

ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment as it is
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for this poll
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would come twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's new default, without the warning
    "RAY_COLOR_PREFIX": "0",  # its warnings are coloured in files too
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # of 30 seconds that a spot node may have
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train says so to its own processes
}
LOCALLY = {
    "RAY_prestart_worker_first_driver": "0",  # processes without Ray Train's settings, which nobody takes
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away
    "RAY_task_events_report_interval_ms": "0",  # no dashboard shows them, and Ray's server remembers 100,000 tasks
}
LIMITS = ("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S")
"""That depend on the configuration: see `set_limits`."""
END_S = 3.0
"""For Ray's processes to end by themselves once the driver has."""
UNUSED_LOCALLY = ("start_api_server", "start_monitor", "start_log_monitor")
"""Python processes that Ray starts, and in part waits for, which a run on one machine has no use for: a dashboard
without pages, an autoscaler without machines, logs for a driver that does not take them. What Ray renames stays."""
ELASTIC_START_S = 10.0
"""A range of workers is placed at once or not at all: Ray may still count a node that is gone, and must look again."""


def start_ray(workers: WorkersConfig, beside: int = 0) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine with room for workers and loaders.

    Args:
        beside: processes beside the workers, each as large as one.
    """
    if ray.is_initialized():
        return
    prepare_environment()
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise UserError(f"RAY_ADDRESS {address}: {_innermost(error)}") from None
        return
    here = cores()
    if workers.least * workers.cpus > here:
        raise UserError(
            f"no room for {workers.least} workers with {workers.cpus:g} CPUs each: this machine has {here} CPUs "
            "(see --workers.num and --workers.cpus)"
        )
    # Ray only counts CPUs. Loaders get as many as there are: they sleep while the workers compute, and vice versa.
    for name, value in LOCALLY.items():
        os.environ.setdefault(name, value)
    set_limits(workers)
    most = min(workers.most, int(here // workers.cpus))
    with _fewer_processes():
        ray.init(
            "local",  # a cluster that happens to run here is another's
            num_cpus=here + int(-(-(most + beside) * workers.cpus // 1)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": train_environment()},
        )
    atexit.register(_end_all_processes)  # before Ray's own ends
    _give_a_head_start()


def _end_all_processes() -> None:
    """End Ray, and kill what of it does not end: now and then a process of Ray 2.60 waits for itself for ever."""
    import psutil

    processes = psutil.Process().children(recursive=True)
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
def _fewer_processes() -> Iterator[None]:
    """Ray's nodes start without `UNUSED_LOCALLY`: a second or two of every start, and memory."""
    from ray._private.node import Node

    known = {name: getattr(Node, name) for name in UNUSED_LOCALLY if hasattr(Node, name)}
    try:
        for name in known:
            setattr(Node, name, lambda self, **options: None)
        yield
    finally:
        for name, method in known.items():
            setattr(Node, name, method)


def cores() -> int:
    """CPUs of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _give_a_head_start() -> None:
    """Start a process that Ray Train's controller would start, and wait for, after seconds of imports of its own."""
    try:
        from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    except ImportError:  # not with this version
        return
    get_or_create_autoscaling_coordinator()


def prepare_environment() -> None:
    """Settings that Ray reads when it starts; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray has read this one when it was imported.
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] != "0"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of Ray's processes would compile its imports anew


def train_environment() -> dict[str, str]:
    """What Ray Train will set for its processes. Ray lets tasks and actors share processes where theirs is the same."""
    names = [*ENVIRONMENT, *LOCALLY, *LIMITS]
    shared = [name for name in names if name.startswith("RAY_TRAIN_")] + ["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"]
    return {name: os.environ[name] for name in shared if name in os.environ}


def set_limits(workers: WorkersConfig) -> None:
    """Limits that Ray Train takes from the environment of the process that calls `fit`."""
    # A rank's own watch, which knows more, speaks first.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(workers.stall_timeout_s + 5)
    start_s = workers.start_timeout_s
    if workers.least < workers.most:
        start_s = min(start_s, ELASTIC_START_S)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_s)


@dataclass(frozen=True)
class Room:
    """What the cluster gives to each worker of a job."""

    gpu: bool  # whether workers get a GPU each
    loader_cpus: float  # that a worker's loaders may use
    threads: int  # torch threads of a worker
    several_nodes: bool  # so that one may be taken away and the run goes on


def require_room(workers: WorkersConfig, beside: int = 0) -> Room:
    """What each worker gets, once the cluster has room for all, or for as many as the run needs.

    Args:
        beside: processes beside the workers, each as large as one.

    Raises:
        UserError: it has none after `start_timeout_s`, where an autoscaler might have added nodes.
    """
    if room := _room(workers, beside):
        return room
    if os.environ.get("RAY_ADDRESS"):
        with _asked_for(workers, beside):
            deadline = time.monotonic() + workers.start_timeout_s
            while time.monotonic() < deadline:
                time.sleep(1)
                if room := _room(workers, beside):
                    return room
    nodes = _alive()
    need = f"{workers.cpus:g} CPUs" + (" and a GPU" if _uses_gpu(workers, nodes) else "")
    who = f"{workers.least} workers" + (" and the validation in the background" if beside else "")
    have = ", ".join(f"{n.get('CPU', 0):g} CPUs {n.get('GPU', 0):g} GPUs" for n in nodes)
    raise UserError(f"no room for {who} with {need} each beside a CPU for loaders: the cluster's nodes have {have}")


def _room(workers: WorkersConfig, beside: int) -> Room | None:
    """What each worker gets of the nodes that there are now; None: there are too few."""
    nodes = _alive()
    gpu = _uses_gpu(workers, nodes)
    room_for = fitting(nodes, workers.cpus, gpus=int(gpu)) - beside
    start = min(room_for, workers.most)
    left = sum(node.get("CPU", 0) for node in nodes) - (start + beside) * workers.cpus
    if room_for < workers.least or left < 1:
        return None
    share = left / start
    return Room(gpu, share, workers.threads or max(1, int(share)), len(nodes) > 1)


def _alive() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _uses_gpu(workers: WorkersConfig, nodes: Sequence[Mapping[str, float]]) -> bool:
    return fitting(nodes, workers.cpus, gpus=1) >= workers.least if workers.use_gpu is None else workers.use_gpu


@contextmanager
def _asked_for(workers: WorkersConfig, beside: int) -> Iterator[None]:
    """An autoscaler adds nodes for what is asked for and has no place: a reservation, which ends with its driver."""
    from ray.util.placement_group import placement_group, remove_placement_group

    each = {"CPU": workers.cpus} | ({"GPU": 1.0} if workers.use_gpu else {})
    place = placement_group([each] * (workers.least + beside) + [{"CPU": 1.0}])
    try:
        yield
    finally:
        remove_placement_group(place)


def place_beside(workers: WorkersConfig, room: Room) -> PlacementGroup:
    """A place for a process as large as a worker, reserved for as long as this driver lives.

    Raises:
        UserError: there is none after `start_timeout_s`.
    """
    from ray.util.placement_group import placement_group

    place = placement_group([resources(workers, room)])
    if not place.wait(workers.start_timeout_s):
        raise UserError(f"no room for {resources(workers, room)} beside the train workers")
    return place


def resources(workers: WorkersConfig, room: Room) -> dict[str, float]:
    """Of a worker, in Ray's words."""
    return {"CPU": workers.cpus} | ({"GPU": 1.0} if room.gpu else {})


def scaling(workers: WorkersConfig, room: Room) -> ScalingConfig:
    """Ray Train's words for it."""
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=workers.num if isinstance(workers.num, int) else (workers.least, workers.most),
        use_gpu=room.gpu,
        resources_per_worker=resources(workers, room),
        elastic_resize_monitor_interval_s=workers.resize_interval_s,
    )


def fitting(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: int) -> int:
    """How many workers the nodes hold."""
    total = 0
    for node in nodes:
        by_gpu = node.get("GPU", 0) // gpus if gpus else float("inf")
        total += int(min(node.get("CPU", 0) // cpus, by_gpu))
    return total
