"""What `jobs/serve.py` can be told."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ray_det.section import NonNegative, PositiveInt, Section, Share


class ServeConfig(Section):
    """The server's memory is bounded: a replica holds at most `max_ongoing_requests` bodies of `max_bytes`."""

    checkpoint: str = Field(description="run folder (its best checkpoint) or checkpoint, path or URI")
    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0: all, without any authentication")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(default=8000, description="port to listen on")
    name: str = Field(
        default="ray_det", pattern=r"^[A-Za-z0-9_-]+$", description="Ray Serve application; the same name replaces it"
    )
    route_prefix: str = Field(default="/", pattern="^/", description="path under which it answers")
    replicas: PositiveInt = Field(default=1, description="copies of the detector")
    cpus: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="CPUs reserved per replica, and its torch threads; default: this machine's, shared out; cluster: 1",
    )
    gpus: NonNegative | None = Field(
        default=None, description="GPUs per replica, 0.5: two share one; default: 1 where there are enough"
    )
    batch_size: PositiveInt = Field(default=8, description="images that are detected together, at most")
    batch_wait_s: NonNegative = Field(default=0.005, description="seconds to wait for images to fill a batch")
    max_ongoing_requests: PositiveInt = Field(default=32, description="requests that a replica works on at once")
    max_queued_requests: Annotated[int, Field(ge=0)] = Field(
        default=64, description="requests that wait for a replica; further ones get 503"
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=60, description="seconds after which a request ends with 408, also one that is sent slowly"
    )
    max_bytes: PositiveInt = Field(default=1 << 25, description="bytes of a request's body")
    max_images: PositiveInt = Field(default=16, description="images of a request")
    max_pixels: PositiveInt | None = Field(default=None, description="pixels of an image; default: as in training")
    min_score: Share = Field(default=0.0, description="lowest score that is answered, unless a request says another")
