"""Host syncs: the count is right where it is known by hand, and a training step has the two that it needs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ray_det.bench.criterion import in_model
from ray_det.bench.syncs import host_syncs
from ray_det.config import OptimConfig
from ray_det.models.build import build_detector
from ray_det.models.detector import to_device
from ray_det.train.optim import build_optimizer
from ray_det.train.step import train_step
from tests.models.zoo import CLASSES, CPU, DETRS, FAMILIES, micro_batch

LOGGED = {"train/step.py": 1}
"""What a step logs."""
OWN = {family: {"models/matching.py": 1} | LOGGED for family in DETRS} | {"fcos": LOGGED, "retinanet": LOGGED}
"""A detection transformer's matcher reads a tensor of costs too."""


def test_a_count_by_hand():
    def prepare(device):
        x = torch.arange(4.0, device=device, requires_grad=True)
        index, host = torch.tensor([0, 2], device=device), torch.ones(2)

        def call():
            with torch.no_grad():
                y = x.clone()
            y[index] = host.to(device, non_blocking=True)
            y[y > 2] = 1.0  # a mask that is filled with one number
            (x * y).sum().backward()
            assert y.tolist() == [1, 1, 1, 1]  # to the host
            assert bool((y == 1).all())  # a value
            assert y[y > 0].shape == (4,)  # a number of elements
            assert y[[0, 1]].shape == y[torch.tensor([0, 1])].shape == (2,)  # two indices to the device
            assert torch.tensor([1.0, 2.0], device=device).cpu().tolist() == [1, 2]  # there, and back

        return call

    counts = host_syncs(prepare)
    assert counts.total() == 7 and len(counts) == 5
    assert all(place.startswith("bench/test_syncs.py:") for place in counts)


@pytest.mark.parametrize("family", OWN)
def test_a_training_step_waits_for_its_matches_and_its_numbers(family):
    """Besides, networks of transformers wait: checks of shapes and of finiteness, `nonzero` for denoising queries."""
    losses: dict[str, float] = {}

    def prepare(device):
        torch.manual_seed(0)
        detector = build_detector(FAMILIES[family], CLASSES)[0].to(device).train()
        optimizer = build_optimizer(OptimConfig(), detector)

        def call():
            batches = [micro_batch(3)]
            result = train_step(detector, optimizer, batches, device=device, clip_norm=0.1, seed=0, global_step=0)
            losses.setdefault(device.type, result.loss)

        return call

    prepare(CPU)()
    counts = host_syncs(prepare)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
    files: Counter[str] = Counter()
    for place, count in counts.items():
        files[place.rpartition(":")[0]] += count
    assert {name: n for name, n in files.items() if not in_model(name + ":")} == OWN[family]


@pytest.mark.parametrize("family", DETRS)
def test_predictions_of_transformers_are_made_without_waiting(family):
    """But for what their networks look at; whoever takes them waits for them."""

    def prepare(device):
        detector = build_detector(FAMILIES[family], CLASSES)[0].to(device).eval()

        def call():
            with torch.no_grad():  # the stand-in is none of inference mode's tensors
                detector.predict(to_device(micro_batch(3), device))

        return call

    assert all(in_model(place) for place in host_syncs(prepare))
