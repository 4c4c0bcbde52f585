"""Every family learns eight pictures by heart."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ray_det.models.detector import Batch, Detector, Prediction
from tests.models.zoo import CLASSES, CNNS, batch, build

RECIPES = {  # learning rate, largest gradient norm, steps
    "fcos": (2e-3, 5.0, 60),
    "retinanet": (1e-3, 5.0, 100),
    "fasterrcnn": (2e-3, 5.0, 60),
    "d_fine": (1e-3, 5.0, 70),
    "rt_detr_v2": (1e-3, 5.0, 40),
    "detr": (1e-3, 0.5, 500),
}


def train(family: str, steps: int | None = None) -> tuple[Detector, Batch, list[float]]:
    """(detector, batch, losses of all steps)."""
    learning_rate, clip, recipe_steps = RECIPES[family]
    detector, pictures = build(family).train(), batch(8)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=learning_rate)
    losses = []
    for _ in range(steps or recipe_steps):
        optimizer.zero_grad()
        loss = detector(pictures)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return detector.eval(), pictures, losses


def ap50(pictures: Batch, predictions: list[Prediction]) -> float:
    """AP at IoU 0.5 by pycocotools."""
    annotations, results = [], []
    for image, (target, found) in enumerate(zip(pictures.targets, predictions, strict=True)):
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            annotations.append({"image_id": image, "category_id": label, **_xywh(box), "iscrowd": 0})
        for box, label, score in zip(*(found[k].tolist() for k in ("boxes", "labels", "scores")), strict=True):
            results.append({"image_id": image, "category_id": label, **_xywh(box), "score": score})
    truth: Any = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(len(predictions))],
        "categories": [{"id": i} for i in range(len(CLASSES))],
        "annotations": [a | {"id": i + 1} for i, a in enumerate(annotations)],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1])


def _xywh(box: list[float]) -> dict:
    x0, y0, x1, y1 = box
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}


@pytest.mark.parametrize("family", [f if f == "fcos" else pytest.param(f, marks=pytest.mark.slow) for f in CNNS])
def test_cnns_find_what_they_learned(family):
    detector, pictures, _ = train(family)
    with torch.inference_mode():
        assert ap50(pictures, detector.predict(pictures)) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("family", ["d_fine", "rt_detr_v2", "detr"])
def test_detrs_bring_the_loss_to_a_third(family):
    _, _, losses = train(family)
    assert sum(losses[-3:]) / 3 <= losses[0] / 3


def test_detr_sets_out_towards_a_third():
    """DETR learns slowly: the whole way is a slow test."""
    _, _, losses = train("detr", steps=100)
    assert sum(losses[-3:]) / 3 <= losses[0] * 0.7
