"""Every family learns eight pictures by heart."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ray_det.models.detector import Batch, Prediction
from tests.models.zoo import CLASSES, CNNS, DETRS, batch, build

STEPS = {"fcos": 60, "retinanet": 60, "fasterrcnn": 60, "d_fine": 60, "rt_detr_v2": 60, "detr": 60}


def train(family: str, learning_rate: float):
    """(detector, batch, losses of all steps)."""
    detector, pictures = build(family).train(), batch(8)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=learning_rate)
    losses = []
    for _ in range(STEPS[family]):
        optimizer.zero_grad()
        loss = detector(pictures)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
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
    truth = COCO()
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


@pytest.mark.parametrize("family", CNNS)
def test_cnns_find_what_they_learned(family):
    detector, pictures, _ = train(family, 2e-3)
    with torch.inference_mode():
        assert ap50(pictures, detector.predict(pictures)) >= 0.8


@pytest.mark.parametrize("family", DETRS)
def test_detrs_bring_the_loss_to_a_third(family):
    _, _, losses = train(family, 1e-3)
    assert sum(losses[-3:]) / 3 <= losses[0] / 3
