"""The server as a Ray Serve deployment.

`jobs/serve.py` runs it; on a cluster, `ray_det.serve.deployment:application` is an import path for `serve deploy` and
KubeRay's RayService, whose `args` are the fields of `ServeConfig`.
"""

from __future__ import annotations

from typing import Any

import cv2
import ray
import torch
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from starlette.applications import Starlette

from ray_det.cluster import fitting
from ray_det.models.compute import set_up_torch
from ray_det.predict.predictor import open_checkpoint
from ray_det.serve.config import ServeConfig
from ray_det.serve.server import Server

RETRY_AFTER_S = 1.0
STARTS = 3
"""Of a replica, before its deployment is said to have failed."""


class Replica:
    """A `Server` in a process of its own."""

    def __init__(self, config: ServeConfig, resources: dict[str, float]) -> None:
        # Where a replica has no GPU, Ray does not hide those that are there.
        device = torch.device("cuda" if resources["num_gpus"] else "cpu")
        threads = max(1, int(resources["num_cpus"]))
        set_up_torch(threads, None, device)
        cv2.setNumThreads(0)  # the decoding threads are the parallelism
        self._server = Server(open_checkpoint(config.checkpoint), device, threads, config)

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._server.app()

    def check_health(self) -> None:
        self._server.check_health()


def application(given: ServeConfig | dict[str, Any]) -> Application:
    """The application for this cluster: CPUs and GPUs that are not given are taken from what it has."""
    config = ServeConfig.model_validate(given)
    resources = resources_of(config)
    configured = serve.deployment(
        name="detector",
        num_replicas=config.replicas,
        ray_actor_options=resources,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        max_constructor_retry_count=STARTS,
    )
    return configured(serve.ingress()(Replica)).bind(config, resources)


def resources_of(config: ServeConfig) -> dict[str, float]:
    """Of a replica, in Ray's words."""
    cpus, gpus = config.cpus or 1.0, config.gpus
    if gpus is None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = float(fitting(nodes, cpus, gpus=1) >= config.replicas)
    return {"num_cpus": cpus, "num_gpus": gpus}
