"""Ray Train's `TorchTrainer` for a driver that does not import torch.

Ray's own class brings torch into the driver, which starts a second later for it, and into its controller before that
asks for the first worker: two seconds more. Both are on the way to the first step, neither has a use for it. Here the
driver goes without, and the controller imports it while the workers' processes start. What sets up torch on the
workers is Ray's `TorchConfig` as it is.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

from ray.train import Result, RunConfig, ScalingConfig
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

HEAD_START_S = 0.3
"""Of the controller's process before others: Ray starts only as many at once as there are cores."""
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
            backend_config=LateTorchConfig("nccl" if scaling_config.use_gpu else "gloo"),
            scaling_config=scaling_config,
            run_config=run_config,
        )

    def fit(self) -> Result:
        threading.Timer(HEAD_START_S, _give_a_head_start).start()
        return super().fit()

    def _create_default_callbacks(self) -> list[Any]:
        unused = UNUSED_ANYWHERE if os.environ.get("RAY_ADDRESS") else UNUSED_ANYWHERE + UNUSED_LOCALLY
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in unused]


@dataclass
class LateTorchConfig(BackendConfig):
    """Ray's `TorchConfig`, imported in a thread of the process that this is unpickled in: controller and workers."""

    backend: str

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        threading.Thread(target=self.torch_config, daemon=True).start()

    @property
    def backend_cls(self) -> type[Backend]:
        return LateTorchBackend

    @property
    def framework(self) -> Any:
        return TrainingFramework.TORCH

    @property
    def train_func_context(self) -> Any:
        return _train_func_context

    def torch_config(self) -> BackendConfig:
        return importlib.import_module("ray.train.torch").TorchConfig(self.backend)


class LateTorchBackend(Backend):
    """The backend of Ray's `TorchConfig`, which is there when the workers are."""

    share_cuda_visible_devices = True  # as Ray's own, and asked for before torch is needed

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        config = cast(LateTorchConfig, backend_config).torch_config()
        config.backend_cls().on_start(worker_group, config)

    def on_training_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        config = cast(LateTorchConfig, backend_config).torch_config()
        config.backend_cls().on_training_start(worker_group, config)

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        config = cast(LateTorchConfig, backend_config).torch_config()
        config.backend_cls().on_shutdown(worker_group, config)


def _train_func_context() -> AbstractContextManager[None]:
    """Of the training function, on a worker: sets its GPU."""
    return importlib.import_module("ray.train.torch").TorchConfig().train_func_context()


def _give_a_head_start() -> None:
    """Start a process that Ray Train's controller would start, and wait for, after seconds of imports of its own."""
    try:
        from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    except ImportError:  # not with this version
        return
    get_or_create_autoscaling_coordinator()
