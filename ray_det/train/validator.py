"""Validation on resources of its own: an actor beside the train workers evaluates one checkpoint after the other."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_det.cluster import resources
from ray_det.data.pipeline import Loaders
from ray_det.models.compute import set_up_torch
from ray_det.train import store
from ray_det.train.evaluation import Evaluated, evaluate_checkpoint
from ray_det.train.job import Payload
from ray_det.train.watch import IDLE, Watch
from ray_det.types import TrainingError


class Validator:
    """One process of a run. A task of it that hangs ends the process, and Ray starts both anew."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._device = torch.device("cuda" if payload.room.gpu else "cpu")
        set_up_torch(payload.room.threads, payload.config.train.deterministic, self._device)
        reference = payload.manifests["val"]
        self._manifest = ray.get(reference)
        self._loaders = Loaders(payload.room.loader_cpus, [(self._manifest, reference)])

    def validate(self, name: str) -> Evaluated | None:
        """Evaluate a checkpoint of the run; None: it is broken."""
        config = self._payload.config
        watch = Watch(f"the validation of {name}", config.workers.stall_timeout_s, self._tell)
        with watch.watching(), store.local_copy(self._payload.run, name) as folder:
            watch.at("evaluation")
            alive = lambda: watch.at("evaluation")  # noqa: E731
            found = evaluate_checkpoint(folder, config, self._manifest, self._loaders.stream, self._device, alive)
            watch.at(IDLE)
            return found

    def _tell(self, message: str) -> None:
        ray.get(self._payload.board.post.remote({"message": message}), timeout=10)


class Validations:
    """Rank 0's side: starts the actor, in its place, when it is first needed; it ends with rank 0."""

    def __init__(self, payload: Payload, place: PlacementGroup) -> None:
        self._payload, self._place = payload, place
        self._actor: Any = None
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="validation")

    def start(self, name: str) -> Future[Evaluated | None]:
        """Begin to evaluate a kept checkpoint."""
        return self._waiting.submit(self._wait, name)

    def _wait(self, name: str) -> Evaluated | None:
        """Raises TrainingError: the cluster has no room for it any more."""
        self._actor = self._actor or self._start_actor()
        found, patience_s = self._actor.validate.remote(name), self._payload.config.workers.stall_timeout_s
        placed = time.monotonic()
        while not ray.wait([found], timeout=1)[0]:
            if placement_group_table(self._place)["state"] == "CREATED":
                placed = time.monotonic()
            elif time.monotonic() - placed > patience_s:
                raise TrainingError(f"for {patience_s:g} s no node has had room for the validation in the background")
        return ray.get(found)

    def _start_actor(self) -> Any:
        payload = self._payload
        workers = payload.config.workers
        needs = resources(workers, payload.room)
        options = ray.remote(Validator).options(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            max_restarts=workers.max_failures,
            max_task_retries=workers.max_failures,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._place),
        )
        return options.remote(payload)
