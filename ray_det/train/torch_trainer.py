"""Ray Train's `TorchTrainer` with its controller in the driver, and without torch there.

Ray's own class runs the controller as an actor, and brings torch into both before the first worker is asked for: that
takes seconds of a start and 500 MB, of no use to anybody. Here only the workers import torch; what sets it up there are
Ray's own functions.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.runtime_context import RuntimeContext
from ray.train import Result, RunConfig, ScalingConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import scaling_policy
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ray_det.connect import replaced

SHUTDOWN_S = 30.0
"""For process groups to end, as Ray waits itself."""
UNUSED = ("DatasetsCallback", "StateManagerCallback")
"""Ray Train's own callbacks that have no use here: one starts a process that splits data sets among workers, who load
their own, the other, which is off by default, takes the controller for an actor."""
CLEANER = "PlacementGroupCleanerCallback"
"""Another process. What a driver has reserved is free again once it is gone; what a sweep's trial has, which is an
actor, only once the sweep is, without this."""


class TorchTrainer(DataParallelTrainer):
    """As `ray.train.torch.TorchTrainer`, without processes that a run has no use for. One `fit` at a time.

    Args:
        train_loop: what every worker runs.
        config: what it gets.
        scaling_config: with GPUs gradients go through NCCL, else through gloo.
        first: what every worker does before it imports torch: start what others can do meanwhile.
    """

    def __init__(
        self,
        train_loop: Callable[[dict[str, Any]], None],
        config: dict[str, Any],
        scaling_config: ScalingConfig,
        run_config: RunConfig,
        first: Callable[[], None],
    ) -> None:
        super().__init__(
            train_loop,
            train_loop_config=config,
            backend_config=TorchConfig("nccl" if scaling_config.use_gpu else "gloo", first),
            scaling_config=scaling_config,
            run_config=run_config,
        )

    def _create_default_callbacks(self) -> list[Any]:
        in_a_trial = os.environ.get("RAY_ADDRESS") and ray.get_runtime_context().get_actor_id()
        unused = UNUSED if in_a_trial else (*UNUSED, CLEANER)
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in unused]

    def _initialize_and_run_controller(self, **options: Any) -> Result:
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # errors are raised: the logs would say them again
        client = {} if self.scaling_config.elasticity_enabled else {"TrainAutoscalingCoordinatorClient": _Coordinator}
        with replaced(scaling_policy, client):
            controller = _Controller(**options)
        asyncio.run(controller.run())
        return controller.get_result()


class _Coordinator(TrainAutoscalingCoordinatorClient):
    """Does not wait for an answer that tells a group of fixed size nothing: the workers' processes start meanwhile."""

    def send_resource_request(self, *args: Any, **kwargs: Any) -> None:
        self._latest_autoscaling_request_time = time.monotonic()
        request = partial(super().send_resource_request, *args, **kwargs)
        threading.Thread(target=request, daemon=True).start()


class _WorkerGroup(WorkerGroup):
    def _init_train_context_on_workers(self, *args: Any, **kwargs: Any) -> None:
        # Ray hands the workers the actor that the controller is, for a question that ours never ask.
        with replaced(RuntimeContext, {"current_actor": None}):
            super()._init_train_context_on_workers(*args, **kwargs)


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup

    async def _run_control_loop_iteration(self) -> None:
        before = self.get_state()
        await super()._run_control_loop_iteration()
        if self.get_state() is before:  # waits for room, where Ray would ask again at once
            await asyncio.sleep(self._health_check_interval_s)


@dataclass
class TorchConfig(BackendConfig):
    """Ray's configuration of the same name, with its defaults.

    Args:
        backend: of torch.distributed.
        first: as of the trainer.
    """

    backend: str
    first: Callable[[], None]

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
        worker_group.execute_async(_run, backend_config.first)
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


def _run(function: Callable[[], None]) -> None:
    function()


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def _call(name: str, **arguments: Any) -> Any:
    """On a worker: a function of Ray's torch backend."""
    return getattr(importlib.import_module("ray.train.torch.config"), name)(**arguments)


def _train_func_context() -> AbstractContextManager[None]:
    """Of the training function, on a worker: sets its GPU."""
    return _call("TorchConfigContextManager")
