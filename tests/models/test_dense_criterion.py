"""Our losses of FCOS and RetinaNet against torchvision's: the same values and gradients of all that a head puts out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from ray_det.models.dense_criterion import assign, fcos_losses, focal_loss, match_by_iou, retinanet_losses
from ray_det.models.detector import Target
from tests.models.zoo import CANVAS, batch, build

FAMILIES = ("fcos", "retinanet", "retinanet, giou")
COUNTS = {"mixed": (3, 0, 7), "none": (0, 0), "crowded": (60, 2, 29), "one": (1,)}
families = pytest.mark.parametrize("family", FAMILIES)


class Answers:
    """A head's, drawn, and both ways from there to losses."""

    def __init__(self, family: str, counts: tuple[int, ...], scale: float) -> None:
        detector: Any = build(family.partition(",")[0])
        self.net = detector.net
        if family.endswith("giou"):  # as in torchvision's second version
            self.net.head.regression_head._loss_type = "giou"
        self.fcos = family == "fcos"
        generator = torch.Generator().manual_seed(0)
        self.targets = [drawn(generator, n) for n in counts]
        with torch.no_grad():
            outputs = detector.outputs(batch(len(counts)))
        self.anchors, self.per_level = outputs.anchors, outputs.per_level
        self.maps = {k: scale * torch.randn(v.shape, generator=generator) for k, v in outputs.maps.items()}
        self.maps["cls_logits"] -= 2
        if self.fcos:  # its head ends with a ReLU
            self.maps["bbox_regression"] = self.maps["bbox_regression"].relu()

    def losses(self, ours: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Losses, and gradients of the maps."""
        maps = {name: value.clone().requires_grad_() for name, value in self.maps.items()}
        levels = [self.per_level] if self.fcos else []
        if ours:
            losses = fcos_losses if self.fcos else retinanet_losses
            found = losses(self.net, self.targets, maps, self.anchors[0], self.per_level)
        else:
            found = self.net.compute_loss(self.targets, maps, self.anchors, *levels)
        torch.stack(list(found.values())).sum().backward()
        return {k: v.item() for k, v in found.items()}, {k: v.grad for k, v in maps.items() if v.grad is not None}


def drawn(generator: torch.Generator, count: int) -> Target:
    """Boxes anywhere on the canvas and beyond, some of them twice, with other labels."""
    size = torch.tensor(CANVAS[::-1])
    corners = torch.rand(count, 2, generator=generator) * size
    boxes = torch.cat([corners, corners + 2 + 50 * torch.rand(count, 2, generator=generator)], 1)
    boxes[count // 2 + 1 :] = boxes[: count - count // 2 - 1]
    if count == 1:  # larger than the coarsest level's range, which has no end
        boxes = boxes + torch.tensor([-1500.0, -1500, 1500, 1500])
    labels = torch.randint(0, 3, (count,), generator=generator)
    target: Any = {"boxes": boxes, "labels": labels}
    return target


@families
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_losses_and_gradients_are_torchvisions(family, counts, scale):
    answers = Answers(family, counts, scale)
    ours, our_gradients = answers.losses(ours=True)
    theirs, their_gradients = answers.losses(ours=False)
    assert list(ours) == list(theirs)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert all(value > 0 for name, value in ours.items() if sum(counts) or name == "classification")
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_retinanet_ignores_what_lies_between_the_thresholds():
    """Otherwise the comparison above would show nothing of it."""
    answers = Answers("retinanet", COUNTS["crowded"], 1.0)
    anchors = answers.anchors[0]
    assigned = assign(answers.targets, anchors, partial(match_by_iou, anchors_A4=anchors, thresholds=(0.4, 0.5)))
    assert assigned.ignored_BA.any(1).all() and not (assigned.ignored_BA & assigned.found).any()


@families
def test_a_background_that_is_not_finite_spoils_no_other_gradient(family):
    """As a head that diverges at anchors without a box: torchvision does not look at their boxes."""
    answers = Answers(family, COUNTS["mixed"], 1.0)
    _, before = answers.losses(ours=True)
    background = before["bbox_ctrness" if family == "fcos" else "bbox_regression"].abs().sum(-1) == 0
    assert background.any() and not background.all()
    answers.maps["bbox_regression"][background] = torch.inf
    losses, after = answers.losses(ours=True)
    assert losses == pytest.approx(answers.losses(ours=False)[0], rel=1e-5)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


def test_the_focal_loss_has_its_own_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([[0, 4, -1, 2, -1, 1], [-1] * 6])
    assert torch.autograd.gradcheck(partial(focal_loss, label_BA=labels), logits)
    truth = (labels[..., None] == torch.arange(5)).double()
    torch.testing.assert_close(focal_loss(logits, labels), sigmoid_focal_loss(logits, truth).sum(-1))


@pytest.mark.parametrize("value", [-200.0, -30.0, 30.0, 200.0])
def test_the_focal_loss_of_large_logits_is_finite(value):
    logits = torch.full((1, 2, 3), value, requires_grad=True)
    loss = focal_loss(logits, torch.tensor([[1, -1]]))
    loss.sum().backward()
    truth = torch.tensor([[[0.0, 1, 0], [0, 0, 0]]])
    torch.testing.assert_close(loss, sigmoid_focal_loss(logits, truth).sum(-1))
    assert torch.isfinite(logits.grad if logits.grad is not None else loss).all()
