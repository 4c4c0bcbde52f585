"""Ray Train's `TorchTrainer` for a driver and a controller that do not import torch.

Ray's own class brings torch into both before the first worker is asked for: four seconds of a start and 300 MB in each,
and neither has a use for it. Here only the workers import it; what sets it up there are Ray's own functions.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import Result, RunConfig, ScalingConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

HEAD_START_S = 0.3
"""Of the controller's process before others: Ray starts only as many at once as there are cores."""
SHUTDOWN_S = 30.0
"""For process groups to end, as Ray waits itself."""
UNUSED_ANYWHERE = ("DatasetsCallback",)
"""Ray Train's own callbacks that start a process each: this one splits data sets among workers, who load their own."""
UNUSED_LOCALLY = ("PlacementGroupCleanerCallback",)
"""It cleans up after a driver that died; a cluster that was started for a run dies with it."""


class TorchTrainer(DataParallelTrainer):
    """As `ray.train.torch.TorchTrainer`, without callbacks whose processes a run has no use for.

    Args:
        train_loop: what every worker runs.
        config: what it gets.
        scaling_config: with GPUs gradients go through NCCL, else through gloo.
    """

    def __init__(
        self,
        train_loop: Callable[[dict[str, Any]], None],
        config: dict[str, Any],
        scaling_config: ScalingConfig,
        run_config: RunConfig,
    ) -> None:
        super().__init__(
            train_loop,
            train_loop_config=config,
            backend_config=TorchConfig("nccl" if scaling_config.use_gpu else "gloo"),
            scaling_config=scaling_config,
            run_config=run_config,
        )

    def fit(self) -> Result:
        timer = threading.Timer(HEAD_START_S, _give_a_head_start)
        timer.start()
        try:
            return super().fit()
        finally:
            timer.cancel()

    def _create_default_callbacks(self) -> list[Any]:
        unused = UNUSED_ANYWHERE if os.environ.get("RAY_ADDRESS") else UNUSED_ANYWHERE + UNUSED_LOCALLY
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in unused]


@dataclass
class TorchConfig(BackendConfig):
    """Ray's configuration of the same name, with its defaults.

    Args:
        backend: of torch.distributed.
    """

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        return TorchBackend

    @property
    def framework(self) -> Any:
        return TrainingFramework.TORCH

    @property
    def train_func_context(self) -> Any:
        return _train_func_context


class TorchBackend(Backend):
    """What Ray's does, with the names of its functions in place of the functions, which cannot be had without torch."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_set_environment, {"MASTER_ADDR": address, "MASTER_PORT": str(port)})
        worker_group.execute(_call, "_set_torch_distributed_env_vars")
        world = len(worker_group)
        shared = {"backend": backend_config.backend, "world_size": world, "init_method": "env://"}
        setup = "_setup_torch_process_group"
        ray.get([worker_group.execute_single_async(i, _call, setup, world_rank=i, **shared) for i in range(world)])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        several = len(worker_group) > 1
        ends = worker_group.execute_async(_call, "_shutdown_torch", destroy_process_group=several)
        ray.wait(ends, num_returns=len(ends), timeout=SHUTDOWN_S)


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def _call(name: str, **arguments: Any) -> Any:
    """On a worker: a function of Ray's torch backend."""
    return getattr(importlib.import_module("ray.train.torch.config"), name)(**arguments)


def _train_func_context() -> AbstractContextManager[None]:
    """Of the training function, on a worker: sets its GPU."""
    return _call("TorchConfigContextManager")


def _give_a_head_start() -> None:
    """Start a process that Ray Train's controller would start, and wait for, after seconds of imports of its own."""
    try:
        from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    except ImportError:  # not with this version
        return
    get_or_create_autoscaling_coordinator()
