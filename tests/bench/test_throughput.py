"""`jobs/bench.py throughput`: its arithmetic, and a small run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ray_det.bench import throughput
from ray_det.models.winograd import WinogradConv2d, use_winograd


def test_flops_are_those_of_forward_and_backward():
    layer, x = nn.Linear(30, 50), torch.randn(7, 30, requires_grad=True)
    assert throughput.flops(lambda: layer(x).sum().backward(), layer) == 3 * 2 * 7 * 30 * 50


def test_flops_are_those_of_direct_convolutions():
    layer, x = nn.Conv2d(96, 128, 3, padding=1), torch.randn(1, 96, 32, 32, requires_grad=True)
    use_winograd(layer)
    assert throughput.flops(lambda: layer(x).sum().backward(), layer) == 3 * 2 * 32 * 32 * 9 * 96 * 128
    assert type(layer) is WinogradConv2d and layer._faster(x)


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0), ([(3, 5), (0, 1)], 3), ([(0, 4), (1, 2), (3, 6)], 6), ([(0, 1), (1, 2)], 2)],
    ids=["none", "apart", "overlapping", "adjacent"],
)
def test_time_in_which_kernels_run(spans, length):
    assert throughput.covered(spans) == length


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A1000", None),
        ("NVIDIA X", None),
    ],
)
def test_peaks_by_name(monkeypatch, gpu, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    assert throughput.peak_of(torch.device("cuda", 0)) == peak


@pytest.mark.slow
def test_a_figure_of_every_batch_size():
    asked = {"models": ["retinanet"], "image_size": 64, "batch_sizes": [1, 2], "modes": ["eager"], "steps": 1}
    config = throughput.Config.model_validate(asked | {"repeats": 1, "threads": 1})
    figures = list(throughput.run(config))
    assert [f.settings["batch_size"] for f in figures] == [1, 2]
    assert all(f.value > 0 and f.peer_value and 0 < f.more["share of a matrix product's rate"] < 1 for f in figures)
    one, two = (f.more["GFLOP per image"] for f in figures)
    assert one == pytest.approx(two)
