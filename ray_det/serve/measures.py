"""What a replica counts. Ray exports it with its own metrics and Serve's, for Prometheus, as `ray_det_serve_…`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.serve.metrics import Counter, Histogram

SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
IMAGES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


class Measures:
    """Metrics with the tags of Serve's own: application, deployment, replica."""

    def __init__(self) -> None:
        self._images = Counter("det_serve_images_total", "images whose detections were answered")
        self._detections = Counter("det_serve_detections_total", "detections that were answered")
        self._refused = Counter("det_serve_refused_total", "requests that were refused, by status", ("status",))
        self._together = Histogram("det_serve_forward_images", "images of a forward pass", IMAGES)
        self._decode_s = Histogram("det_serve_decode_s", "seconds from an image's bytes to its canvas", SECONDS)
        self._forward_s = Histogram("det_serve_forward_s", "seconds of a forward pass, detections included", SECONDS)

    def answered(self, images: int, detections: int) -> None:
        self._images.inc(images)
        if detections:  # 0 is refused
            self._detections.inc(detections)

    def refused(self, status: int) -> None:
        self._refused.inc(tags={"status": str(status)})

    @contextmanager
    def decoding(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._decode_s.observe(time.perf_counter() - began)

    @contextmanager
    def forward(self, images: int) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._together.observe(images)
        self._forward_s.observe(time.perf_counter() - began)
