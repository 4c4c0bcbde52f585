"""Ray Serve around a detector, from the start to the signal that ends it."""

from __future__ import annotations

import logging
import socket
import time

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from ray_det.cluster import cores
from ray_det.connect import connect, end, start_here
from ray_det.predict.predictor import open_checkpoint
from ray_det.serve.config import ServeConfig
from ray_det.serve.deployment import application
from ray_det.storage import Folder
from ray_det.train.launch import signals
from ray_det.types import Stopped, UserError

POLL_S = 0.2


def serve_until_stopped(config: ServeConfig) -> None:
    """Serve on the cluster that RAY_ADDRESS names, or on this machine alone, until SIGINT or SIGTERM.

    Requests that are being worked on are answered before it ends. Ray, where it was started here, ends with it; on a
    cluster the application is deleted, and Serve is shut down where that was its last.

    Raises:
        UserError: no checkpoint, no room, or the port is taken.
        Stopped: at the signal.
    """
    open_checkpoint(config.checkpoint)  # what is wrong with it is said before anything starts
    config = config.model_copy(update={"checkpoint": Folder.at(config.checkpoint).uri})
    local = not connect()
    if local:
        config = _start_here(config)
    with signals() as asked:  # from here on: Ray's start takes SIGTERM for itself
        try:
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(
                http_options=HTTPOptions(host=config.host, port=config.port, request_timeout_s=config.timeout_s)
            )
            serve.run(application(config), name=config.name, route_prefix=config.route_prefix)
            print(_greeting(config, local), flush=True)
            while not asked:
                time.sleep(POLL_S)
            print("stopping; requests that came before are answered", flush=True)
        finally:
            _stop(config.name, local)
    raise Stopped("stopped", asked[0])


def _start_here(config: ServeConfig) -> ServeConfig:
    """Start Ray on this machine; -> with its CPUs shared out."""
    here = cores()
    cpus = config.cpus or (here // config.replicas or here / config.replicas)
    if cpus * config.replicas > here:
        raise UserError(
            f"no room for {config.replicas} replicas with {cpus:g} CPUs each: this machine has {here} CPUs "
            "(see --replicas and --cpus)"
        )
    _require_free(config.host, config.port)
    start_here(here)
    return config.model_copy(update={"cpus": cpus})


def _require_free(host: str, port: int) -> None:
    """Serve's proxy would fail to listen, and be started again, for ever."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} (--host, --port): {error.strerror}") from None


def _greeting(config: ServeConfig, local: bool) -> str:
    at = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}"
    lines = [f"serving {config.checkpoint} at {at}{config.route_prefix}"]
    if local:
        lines.append(f"metrics at http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics")
    return "\n".join(lines)


def _stop(name: str, local: bool) -> None:
    serve.delete(name)  # first: with Serve the proxy goes too, and with it the connections of requests
    if local or not serve.status().applications:
        serve.shutdown()
    end()
