"""The server's parts that need no server around them."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch

import ray_det
from ray_det.predict.predictor import Predictor, open_checkpoint
from ray_det.serve import server as server_module
from ray_det.serve.config import ServeConfig
from ray_det.serve.page import HEADERS, page
from ray_det.serve.server import Server
from ray_det.types import UserError
from tests.models.zoo import CPU


@pytest.fixture(scope="module")
def server(checkpoint) -> Server:
    return Server(open_checkpoint(str(checkpoint)), CPU, 1, ServeConfig(checkpoint=str(checkpoint)))


@pytest.fixture(scope="module")
def detector(checkpoint):
    return ray_det.load(str(checkpoint), device="cpu")


def same(found, others):
    """For each of the found detections, which one of the others has its label, place and score."""
    tables = [np.column_stack([one.boxes_N4, 1e4 * one.labels_N, 1e4 * one.scores_N]) for one in (found, others)]
    pairs = np.abs(tables[0][:, None] - tables[1]).max(axis=-1).argmin(axis=1)
    assert sorted(pairs) == list(range(len(others.labels_N)))
    assert np.array_equal(found.labels_N, others.labels_N[pairs])
    return pairs


def test_batch_mates_do_not_matter(server, detector, pictures, monkeypatch):
    """Images of one canvas share a forward pass, and each finds what it finds alone."""
    passes, detect = [], server._predictor.detect

    def noted(batches):
        passes.extend(batch.pixels_BHW3.shape for batch in batches)
        return detect(batches)

    monkeypatch.setattr(server._predictor, "detect", noted)
    contents = [*pictures.values()]
    prepared = [detector.prepare(content) for content in contents]
    canvases = [one.pixels_BHW3.shape[1:3] for one in prepared]
    for content, found in zip(contents, server._forward(prepared), strict=True):
        (alone,) = detector.predict([content])
        assert len(alone.scores_N) > 0
        pairs = same(found, alone)  # nearly equal scores may change places
        np.testing.assert_allclose(found.boxes_N4, alone.boxes_N4[pairs], rtol=1e-5, atol=1e-4)  # hundreds of pixels
        np.testing.assert_allclose(found.scores_N, alone.scores_N[pairs], rtol=0, atol=1e-4)
    assert len(passes) == len(set(canvases)) > 1
    assert {shape[1:3]: shape[0] for shape in passes} == {one: canvases.count(one) for one in canvases}


def test_one_thread_makes_the_detector_and_computes(checkpoint, detector, pictures, monkeypatch):
    """A second one would have OpenMP threads of its own, and with more of them than cores both are slow."""
    threads = []

    class Noted(Predictor):
        def __init__(self, *args):
            threads.append(threading.current_thread())
            super().__init__(*args)

        def detect(self, batches):
            threads.append(threading.current_thread())
            return super().detect(batches)

    monkeypatch.setattr(server_module, "Predictor", Noted)
    server = Server(open_checkpoint(str(checkpoint)), CPU, 1, ServeConfig(checkpoint=str(checkpoint)))
    asyncio.run(server._detect_all([detector.prepare(pictures["gray.jpg"])]))
    assert len(threads) == 2 and threads[0] is threads[1] is not threading.current_thread()


def test_the_servers_own_limit_of_pixels_counts(checkpoint, pictures):
    config = ServeConfig(checkpoint=str(checkpoint), max_pixels=1000)
    predictor = Server(open_checkpoint(str(checkpoint)), CPU, 1, config)._predictor
    with pytest.raises(UserError, match="more pixels than max_pixels 1000"):
        predictor.prepare(pictures["gray.jpg"])


def test_a_dead_device_is_told(checkpoint, detector, pictures, monkeypatch):
    """Then Serve replaces the replica; other errors are one request's."""
    server = Server(open_checkpoint(str(checkpoint)), CPU, 1, ServeConfig(checkpoint=str(checkpoint)))

    def failing(error):
        def detect(batches):
            raise error

        monkeypatch.setattr(server._predictor, "detect", detect)
        with pytest.raises(type(error)):
            server._forward([detector.prepare(pictures["gray.jpg"])])

    failing(RuntimeError("of this batch"))
    server.check_health()
    failing(torch.AcceleratorError("device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        server.check_health()


def test_the_page_escapes_what_it_shows_and_loads_nothing():
    evil = "<script>alert(1)</script>"
    facts = {"name": evil, "model": evil, "image_size": 1, "device": evil, "global_step": 1, "val_ap": None}
    html = page(facts | {"classes": [{"id": 1, "name": evil}]})
    assert evil not in html and html.count("&lt;script&gt;alert(1)") == 5
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert HEADERS["Content-Security-Policy"].startswith("default-src 'none';")


def test_the_page_names_some_of_many_classes():
    facts = {"name": "many", "model": "m", "image_size": 1, "device": "cpu", "global_step": 1, "val_ap": 0.5}
    html = page(facts | {"classes": [{"id": i, "name": f"kind{i}"} for i in range(80)]})
    assert "kind11 and 68 more" in html and "kind12" not in html and "val AP 0.500" in html
