"""A detector behind HTTP: threads decode, images of all requests meet in batches on the device, each gets its answer.

The application is plain ASGI; `deployment` gives it to Ray Serve.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import torch
from ray import serve
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ray_det.data.decode import reason
from ray_det.data.files import OverLimitError
from ray_det.predict.predictor import Predictor
from ray_det.serve.answers import answer, bounded, images_of, min_score_of
from ray_det.serve.config import ServeConfig
from ray_det.serve.measures import Measures
from ray_det.serve.page import HEADERS, page
from ray_det.train.checkpoint import Checkpoint
from ray_det.types import Detections, ImageLimits, MicroBatch, UserError


class Server:
    """One detector on one device, and the HTTP application in front of it."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, threads: int, config: ServeConfig) -> None:
        trained = checkpoint.config.data.limits
        limits = ImageLimits(config.max_pixels or trained.pixels, config.max_bytes)
        self._config = config
        self._facts = facts(checkpoint, device, config, limits)
        self._measures = Measures()
        self._broken: str | None = None
        # A decoded image is large, so that few are decoded at once; the device has a thread that none of them can take.
        self._decoders = ThreadPoolExecutor(max(2, threads), "decode")
        self._device = ThreadPoolExecutor(1, "detect")
        # Made there too: every thread that computes gets OpenMP threads of its own, and where there are more of them
        # than cores, they fall asleep at the end of every operator, in place of waiting for the next.
        self._predictor = self._device.submit(Predictor, checkpoint, device, limits).result()
        together = serve.batch(max_batch_size=config.batch_size, batch_wait_timeout_s=config.batch_wait_s)
        self._detect: Any = together(self._detect_all)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/model", self._model),
                Route("/health", self._health),
                Route("/predict", self._predict, methods=["POST"]),
            ],
            exception_handlers={HTTPException: self._refuse, Exception: self._fail},
        )

    def check_health(self) -> None:
        """Raises RuntimeError: the device does not answer any more, and this process must be replaced."""
        if self._broken:
            raise RuntimeError(self._broken)

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(page(self._facts), headers=HEADERS)

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._facts)

    async def _health(self, request: Request) -> Response:
        if self._broken:
            raise HTTPException(503, self._broken)
        return JSONResponse({"status": "ok"})

    async def _predict(self, request: Request) -> Response:
        min_score = min_score_of(request, self._config.min_score)
        files = await images_of(bounded(request, self._config.max_bytes), self._config.max_images)
        prepared = await asyncio.gather(*(self._prepare(name, content) for name, content in files))
        found = await asyncio.gather(*(self._detect(one) for one in prepared))
        sizes = [(int(height), int(width)) for one in prepared for height, width in one.orig_sizes_B2]
        images = answer([name for name, _ in files], sizes, found, self._predictor.classes, min_score)
        self._measures.answered(len(images), sum(len(image["detections"]) for image in images))
        return JSONResponse({"images": images})

    async def _prepare(self, name: str, content: bytes) -> MicroBatch:
        def work() -> MicroBatch:
            with self._measures.decoding():
                return self._predictor.prepare(content)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, work)
        except UserError as error:
            why = error.__cause__ or error
            status = 413 if isinstance(why, OverLimitError) else 400
            raise HTTPException(status, f"{name}: {reason(why)}" if name else reason(why)) from None

    async def _detect_all(self, images: list[MicroBatch]) -> list[Detections]:
        """What `serve.batch` calls with the images that wait, of whatever requests."""
        return await asyncio.get_running_loop().run_in_executor(self._device, self._forward, images)

    def _forward(self, images: list[MicroBatch]) -> list[Detections]:
        """Detections, in order. Images of one canvas share a forward pass, and none is padded for another."""
        by_canvas: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, image in enumerate(images):
            by_canvas[image.pixels_BHW3.shape].append(i)
        found: dict[int, Detections] = {}
        try:
            for rows in by_canvas.values():
                with self._measures.forward(len(rows)):
                    (detections,) = self._predictor.detect([MicroBatch.joined([images[i] for i in rows])])
                found.update(zip(rows, detections, strict=True))
        except torch.AcceleratorError as error:  # no later kernel would run in this process
            self._broken = reason(error)
            raise
        return [found[i] for i in range(len(images))]

    def _refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self._measures.refused(error.status_code)
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    def _fail(self, request: Request, error: Exception) -> Response:
        """A fault of ours; the traceback goes to the replica's log."""
        self._measures.refused(500)
        return JSONResponse({"error": f"internal error: {type(error).__name__}"}, 500)


def facts(checkpoint: Checkpoint, device: torch.device, config: ServeConfig, limits: ImageLimits) -> dict[str, Any]:
    """JSON of `GET /model`."""
    trained, state = checkpoint.config, checkpoint.state
    return {
        "name": trained.name,
        "model": trained.model.name,
        "image_size": trained.data.image_size,
        "global_step": state.global_step,
        "val_ap": state.best_ap,
        "classes": checkpoint.classes.to_json(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ray_det": metadata.version("ray-det"),
        "limits": {"bytes": limits.bytes, "pixels": limits.pixels, "images": config.max_images},
        "min_score": config.min_score,
    }
