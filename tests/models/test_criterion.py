"""Our criteria against the library's: the same matches, losses and gradients of all that a network puts out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.d_fine.modeling_d_fine import get_contrastive_denoising_training_group

from ray_det.models.criterion import without_syncs
from ray_det.models.matching import MatchCosts, match
from ray_det.models.transformers_adapter import ExactCriterion

IMAGES, LAYERS, QUERIES, CLASSES, BINS = 3, 3, 30, 5, 33
FAMILIES = {
    "d_fine": "DFineForObjectDetection",
    "rt_detr": "RTDetrForObjectDetection",
    "rt_detr_v2": "RTDetrV2ForObjectDetection",
    "detr": "ForObjectDetection",
    "deformable_detr": "DeformableDetrForObjectDetection",
    "conditional_detr": "ConditionalDetrForObjectDetection",
    "dab-detr": "DabDetrForObjectDetection",
}
COUNTS = {"mixed": (3, 0, 7), "none": (0, 0, 0), "many": (60, 2, 29), "one each": (1, 1, 1)}


def targets(counts: tuple[int, ...], seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(0, CLASSES, (n,), generator=generator),
            "boxes": random_boxes(generator, n),
        }
        for n in counts
    ]


def random_boxes(generator: torch.Generator, *shape: int) -> Tensor:
    centre, size = torch.rand(*shape, 2, generator=generator), torch.rand(*shape, 2, generator=generator)
    return torch.cat([0.2 + 0.6 * centre, 0.05 + 0.3 * size], -1)


@dataclass
class Answers:
    """What a network hands to its loss function."""

    leaves: dict[str, Tensor]
    arguments: dict[str, Any]

    def loss(self, family: str, *, ours: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Parts of the loss by name, and gradients."""
        function = LOSS_MAPPING[FAMILIES[family]]
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in self.leaves.items()}
        layers_first = family in ("detr", "deformable_detr", "conditional_detr", "dab-detr")
        last = (lambda x: x[-1]) if layers_first else (lambda x: x[:, -1])
        criterion = ExactCriterion(without_syncs(function) if ours else function)
        total, parts, _ = criterion(
            last(leaves["outputs_class"]),
            self.arguments["labels"],
            torch.device("cpu"),
            last(leaves["outputs_coord"]),
            self.arguments["config"],
            **leaves,
            denoising_meta_values=self.arguments["denoising"],
        )
        summed = {"loss": total.item()}
        for key, value in parts.items():
            name = "_".join(key.split("_")[:2])
            summed[name] = summed.get(name, 0.0) + value.item()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return summed, dict(zip(leaves, gradients, strict=True))


def answers(family: str, counts: tuple[int, ...], noisy: bool = True, **fields: Any) -> Answers:
    generator = torch.Generator().manual_seed(1)
    config = CONFIG_MAPPING[family]()
    config.id2label = {i: str(i) for i in range(CLASSES)}
    for name, value in ({"auxiliary_loss": True, "decoder_layers": LAYERS} | fields).items():
        setattr(config, name, value)
    labels = targets(counts)
    leaves: dict[str, Tensor] = {}
    denoising, queries = None, QUERIES
    if family in ("d_fine", "rt_detr", "rt_detr_v2"):
        wanted = 20 if noisy else 0
        embed = nn.Embedding(CLASSES + 1, 4)
        *_, denoising = get_contrastive_denoising_training_group(labels, CLASSES, QUERIES, embed, wanted)
        queries = sum(denoising["dn_num_split"]) if denoising else QUERIES
        lead = (IMAGES, LAYERS + (family == "d_fine"), queries)
        leaves["enc_topk_logits"] = torch.randn(IMAGES, QUERIES, CLASSES, generator=generator)
        leaves["enc_topk_bboxes"] = random_boxes(generator, IMAGES, QUERIES)
    else:
        lead = (LAYERS, IMAGES, queries)
    classes = CLASSES + (family == "detr")
    leaves["outputs_class"] = torch.randn(*lead, classes, generator=generator)
    leaves["outputs_coord"] = random_boxes(generator, *lead)
    if family == "d_fine":
        lead = (IMAGES, LAYERS, queries)
        leaves["predicted_corners"] = torch.randn(*lead, 4 * BINS, generator=generator)
        leaves["initial_reference_points"] = random_boxes(generator, *lead)
    return Answers(leaves, {"labels": labels, "config": config, "denoising": denoising})


def assert_equal(given: Answers, family: str) -> dict[str, float]:
    parts, gradients = given.loss(family, ours=True)
    expected_parts, expected_gradients = given.loss(family, ours=False)
    for name, part in parts.items():
        assert part == pytest.approx(expected_parts[name], rel=1e-5), name
    for name, expected in expected_gradients.items():
        assert (gradients[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    return parts


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_librarys(family, counts):
    parts = assert_equal(answers(family, counts), family)
    boxless = {"loss_bbox", "loss_giou", "loss_fgl"} if not any(counts) else set()
    assert all((value == 0) == (name in boxless) for name, value in parts.items())


@pytest.mark.parametrize("family", ["d_fine", "rt_detr_v2"])
def test_without_denoising_queries(family):
    assert_equal(answers(family, COUNTS["mixed"], noisy=False), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_last_layer_alone(family):
    assert_equal(answers(family, COUNTS["mixed"], noisy=False, auxiliary_loss=False), family)


def test_with_softmax_costs():
    assert_equal(answers("rt_detr_v2", COUNTS["mixed"], use_focal_loss=False), "rt_detr_v2")


def test_the_function_of_the_library_stays_what_it_was():
    function = LOSS_MAPPING[FAMILIES["d_fine"]]
    ours = without_syncs(function)
    assert ours is not function and function.__globals__["DFineLoss"].__module__.startswith("transformers")
    other = LOSS_MAPPING["ForCausalLM"]
    assert without_syncs(other) is other


def test_perfect_predictions_are_matched_with_their_boxes():
    """Every layer and image has its own order of queries; of 40 boxes the 30 queries take 30."""
    labels = targets((4, 0, 40))
    boxes, logits = torch.zeros(2, 3, 30, 4), torch.full((2, 3, 30, CLASSES), -5.0)
    expected: dict[tuple[int, int], int] = {}
    order = np.random.default_rng(0)
    for layer in range(2):
        for image, first in ((0, 0), (2, 4)):
            for query in range(30):
                boxes[layer, image, query] = torch.tensor([0.5, 0.5, 1.0, 1.0])
            for box, query in enumerate(order.permutation(30)[: len(labels[image]["boxes"])]):
                boxes[layer, image, query] = labels[image]["boxes"][box]
                logits[layer, image, query, labels[image]["class_labels"][box]] = 5.0
                expected[layer, image * 30 + int(query)] = first + box
    for focal in (None, (0.25, 2.0)):
        query_LM, box_LM = match(logits, boxes, labels, MatchCosts(1.0, 5.0, 2.0, focal))
        assert query_LM.shape == box_LM.shape == (2, 34)
        found = {(i, int(q)): int(b) for i in range(2) for q, b in zip(query_LM[i], box_LM[i], strict=True)}
        assert found == expected


def test_what_is_not_finite_is_matched_last():
    labels = targets((2,))
    boxes = torch.full((1, 1, 4, 4), torch.nan)
    boxes[0, 0, 1], boxes[0, 0, 3] = labels[0]["boxes"][1], labels[0]["boxes"][0]
    query_LM, box_LM = match(torch.zeros(1, 1, 4, CLASSES), boxes, labels, MatchCosts(1.0, 5.0, 2.0, None))
    assert dict(zip(box_LM[0].tolist(), query_LM[0].tolist(), strict=True)) == {0: 3, 1: 1}
