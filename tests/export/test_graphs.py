"""A detector as a function of tensors answers as the detector, in shapes that are known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ray_det.export.onnx_file import graph_of
from ray_det.export.suppression import best, nms_mask, suppressed
from ray_det.models.detector import Detector, Prediction
from tests.models.zoo import FAMILIES, batch, build, spread_scores


def agree(wanted: Prediction, boxes: Tensor, scores: Tensor, labels: Tensor) -> None:
    """The same boxes, of which those of one score may change places."""
    there = scores > 0
    assert len(wanted["scores"]) == there.sum() > 0
    assert torch.allclose(wanted["scores"], scores[there], atol=1e-4)
    assert (labels[~there] == -1).all() and (boxes[~there] == 0).all()
    for box, score, label in zip(wanted["boxes"], wanted["scores"], wanted["labels"], strict=True):
        if score - scores[there].min() < 1e-4:
            continue  # of equal scores at the end, either may have been left out
        near = (boxes - box).abs().max(1).values < 1e-2
        assert (near & (labels == label) & ((scores - score).abs() < 1e-4)).any()


@pytest.fixture(params=FAMILIES)
def detector(request) -> Detector:
    return spread_scores(build(request.param))


def test_answers_are_those_of_the_detector(detector):
    """On images of mixed sizes; what lies beyond a size does not matter."""
    images = batch(3)
    graph: Any = graph_of(detector)
    pixels = torch.where(images.pixel_mask_BHW[:, None], images.images_B3HW, torch.full_like(images.images_B3HW, 200))
    with torch.no_grad():
        wanted = detector.predict(images)
        boxes, scores, labels = graph(pixels, torch.tensor(images.sizes))
    assert boxes.shape == (3, graph.places, 4) and scores.shape == labels.shape == (3, graph.places)
    for one, *answer in zip(wanted, boxes, scores, labels, strict=True):
        agree(one, *answer)


def test_fewer_boxes_than_places_are_filled_up():
    detector = spread_scores(build("fcos"))
    net: Any = detector.get_submodule("net")
    net.score_thresh = float(detector.predict(batch(1))[0]["scores"][30].detach())
    with torch.no_grad():
        (wanted,) = detector.predict(batch(1))
        boxes, scores, labels = graph_of(detector)(batch(1).images_B3HW, torch.tensor(batch(1).sizes))
    assert 0 < len(wanted["scores"]) < 100
    agree(wanted, boxes[0], scores[0], labels[0])


def test_suppression_within_groups():
    """Worked out by hand: the second box hides behind the first, the third is of another group, the fourth far off."""
    boxes = torch.tensor([[[0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 10, 10]]]).float()
    scores, groups = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.0]]), torch.tensor([[0, 0, 1, 0, 0]])
    assert nms_mask(boxes, scores, groups, 2, 0.5).tolist() == [[True, False, True, True, False]]
    assert nms_mask(boxes, scores, groups, 2, 0.9).tolist() == [[True, True, True, True, False]]
    kept, found, labels = suppressed(boxes, scores, groups, 2, 0.5, 4)
    assert torch.allclose(found, torch.tensor([[0.9, 0.7, 0.6, 0.0]]))
    assert labels[0, :3].tolist() == [0, 1, 0] and kept[0, :3, 0].tolist() == [0, 1, 50]


def test_the_best_of_fewer():
    scores, values = best(torch.tensor([[0.2, 0.5]]), 3, torch.tensor([[7, 9]]))
    assert torch.allclose(scores, torch.tensor([[0.5, 0.2, 0.0]])) and values[0, :2].tolist() == [9, 7]
