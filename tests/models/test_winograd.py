"""Winograd's 3x3 convolutions give a direct convolution's values and gradients, and are taken where they are faster."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from ray_det.config import ModelConfig
from ray_det.models.build import build_detector
from ray_det.models.winograd import WinogradConv2d, suits
from tests.models.zoo import CLASSES


def layer(inputs=96, outputs=80, bias=True):
    torch.manual_seed(0)
    return WinogradConv2d(inputs, outputs, 3, padding=1, bias=bias)


def errors(layer, x):
    """Largest relative errors of values and gradients against float64: ours, a direct convolution's."""
    given = [x.requires_grad_(), *layer.parameters()]
    grad = torch.randn(len(x), layer.out_channels, *x.shape[2:])
    exact = [t.detach().double().requires_grad_() for t in given]
    want = conv2d(*exact, padding=1)
    want = [want, *torch.autograd.grad(want, exact, grad.double())]

    def relative(out, given):
        got = [out, *torch.autograd.grad(out, given, grad)]
        assert [t.shape for t in got] == [t.shape for t in want]
        return max(float((g - w).detach().abs().max() / w.detach().abs().max()) for g, w in zip(got, want, strict=True))

    return relative(layer(x), given), relative(conv2d(*given, padding=1), given)


@pytest.mark.parametrize("size", [(32, 40), (33, 41), (34, 42), (35, 43), (7, 200), (256, 1)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_values_and_gradients_are_as_exact_as_a_direct_convolutions(size, memory):
    torch.manual_seed(1)
    x = torch.randn(2, 96, *size).contiguous(memory_format=memory)
    ours, direct = errors(layer(), x)
    assert ours < 1e-5 and ours < 10 * direct
    assert not torch.equal(layer()(x), conv2d(x, layer().weight, layer().bias, padding=1))  # it was another algorithm


def test_frozen_weights_and_no_bias():
    plain = layer(bias=False).requires_grad_(False)
    x = torch.randn(1, 96, 40, 40, requires_grad=True)
    out = plain(x)
    torch.testing.assert_close(out, conv2d(x, plain.weight, padding=1), rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert x.grad is not None and plain.weight.grad is None


def test_the_first_trained_layer_needs_no_gradient_of_its_input():
    trained, x = layer(), torch.randn(1, 96, 40, 40)
    trained(x).square().sum().backward()
    (wanted,) = torch.autograd.grad(conv2d(x, trained.weight, trained.bias, padding=1).square().sum(), trained.weight)
    torch.testing.assert_close(trained.weight.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("how", ["few tiles", "bfloat16", "autocast", "double"])
def test_all_else_stays_pytorchs_own(how):
    ours, plain = layer(), nn.Conv2d(96, 80, 3, padding=1)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(1, 96, *((20, 20) if how == "few tiles" else (40, 40)))
    dtype = {"bfloat16": torch.bfloat16, "double": torch.float64}.get(how, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert torch.equal(*(one.to(dtype)(x.to(dtype)) for one in (ours, plain)))


def test_an_exported_graph_has_a_convolution():
    graph = torch.export.export(layer(), (torch.randn(1, 96, 40, 40),)).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == ["aten.conv2d.default"]


@pytest.mark.parametrize(
    ("other", "does"),
    [
        ({}, True),
        ({"kernel_size": 1}, False),
        ({"stride": 2}, False),
        ({"padding": 0}, False),
        ({"padding": "same"}, False),
        ({"dilation": 2}, False),
        ({"groups": 2}, False),
        ({"padding_mode": "reflect"}, False),
        ({"in_channels": 48}, False),
        ({"out_channels": 4}, False),
    ],
)
def test_which_layers_suit(other, does):
    usual = {"in_channels": 96, "out_channels": 96, "kernel_size": 3, "padding": 1}
    assert suits(nn.Conv2d(**usual | other)) is does


def test_a_detectors_towers_are_faster_and_its_weights_the_librarys():
    detector, _ = build_detector(
        ModelConfig(name="torchvision/fcos_mobilenet_v3_small_fpn", weights="none", fpn_channels=96), CLASSES
    )
    faster = {name for name, module in copy.deepcopy(detector).named_modules() if type(module) is WinogradConv2d}
    towers = {f"net.head.{kind}_head.conv.{i}" for kind in ("classification", "regression") for i in (0, 3, 6, 9)}
    assert faster == towers | {f"net.backbone.fpn.layer_blocks.{i}.0" for i in range(3)}
    assert {f"{name}.weight" for name in faster} < set(detector.state_dict())
