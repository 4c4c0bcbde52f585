"""RoIAlign with all threads of a CPU gives torchvision's values and gradients."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from ray_det.models.roi_pool import pool_boxes

CANVAS = (480, 640)  # boxes of the coarsest level have sides of 448 pixels and more
NAMES = ["0", "1", "2", "3"]


def pyramid(names=NAMES):
    """Levels of 4, 8, 16 and 32 pixels a cell, and one that the pool does not take."""
    strides = dict(zip(names, (4, 8, 16, 32), strict=False)) | {"pool": 64}
    torch.manual_seed(0)
    return {
        name: torch.randn(3, 5, CANVAS[0] // s, CANVAS[1] // s).contiguous(memory_format=torch.channels_last)
        for name, s in strides.items()
    }


def both(boxes, names=NAMES):
    """Cells and the levels' gradients: ours and torchvision's."""
    features = {name: level.requires_grad_() for name, level in pyramid(names).items()}
    used = [features[name] for name in names]
    ours = pool_boxes(MultiScaleRoIAlign(names, 7, 2), features, boxes, CANVAS)
    theirs = MultiScaleRoIAlign(names, 7, 2)(features, boxes, [CANVAS] * len(boxes))
    wanted = torch.randn_like(theirs)
    return [
        [cells, *torch.autograd.grad(cells, used, wanted, allow_unused=True, materialize_grads=True)]
        for cells in (ours, theirs)
    ]


def agree(boxes, names=NAMES):
    ours, theirs = both(boxes, names)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    return theirs


@pytest.mark.parametrize("names", [NAMES, NAMES[:1]], ids=["four levels", "one level"])
def test_values_and_gradients_are_torchvisions(names):
    torch.manual_seed(1)
    boxes = []
    for many in (200, 0, 60):
        corner, size = torch.rand(many, 2) * 600 - 100, torch.rand(many, 2) ** 3 * 700
        boxes.append(torch.cat([corner, corner + size], 1))
    cells, *gradients = agree(boxes, names)
    assert cells.abs().sum() and all(g.abs().sum() for g in gradients)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 640, 480),
        (0, 0, 0, 0),
        (639.9, 479.9, 640, 480),
        (-9, -9, 4, 4),
        (636, 476, 672, 514),
        (700, 500, 760, 560),
    ],
    ids=["whole canvas", "a point", "last pixel", "over the first corner", "over the last corner", "outside"],
)
def test_the_edges_are_torchvisions(box):
    agree([torch.tensor([box], dtype=torch.float32), torch.zeros(0, 4), torch.zeros(0, 4)])


def test_no_box_at_all():
    cells, *_ = agree([torch.zeros(0, 4)] * 3)
    assert cells.shape == (0, 5, 7, 7)
