"""Layers that are slow in bfloat16 on CPUs are computed in float32 there, and pass on the precision around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ray_det.config import ModelConfig
from ray_det.models.build import build_detector
from ray_det.models.detector import to_device
from ray_det.models.precision import Float32Conv2d, Float32GroupNorm, keep_attention_in_float32, keep_in_float32
from ray_det.types import MicroBatch
from tests.models.zoo import CLASSES, CPU, FAMILIES, batch, build, gradients

STRIDED: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": 64,
    "kernel_size": 3,
    "stride": 2,
    "padding": 1,
    "groups": 64,
}


def kept(layer):
    network = nn.Sequential(layer)
    keep_in_float32(network)
    return network[0]


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(**STRIDED), lambda: nn.GroupNorm(32, 64)], ids=["conv", "norm"])
def test_values_and_gradients_under_autocast_are_those_of_float32(make):
    torch.manual_seed(0)
    plain = make()
    x = torch.randn(2, 64, 12, 12).bfloat16().contiguous(memory_format=torch.channels_last)
    want = plain(x.float())
    grad = torch.randn_like(want).bfloat16()
    wanted = torch.autograd.grad(want, [*plain.parameters()], grad.float())

    layer = kept(make())
    layer.load_state_dict(plain.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert torch.equal(out, want.bfloat16())
    for got, exact in zip(torch.autograd.grad(out, [*layer.parameters()], grad), wanted, strict=True):
        assert torch.equal(got, exact)


def test_the_norms_kernel_gets_float32(monkeypatch):  # which its values do not show: it rounds at the end only
    taken, group_norm = [], torch.group_norm
    monkeypatch.setattr(torch, "group_norm", lambda x, *more: taken.append(x.dtype) or group_norm(x, *more))
    with torch.autocast("cpu", torch.bfloat16):
        kept(nn.GroupNorm(32, 64))(torch.randn(2, 64, 12, 12).bfloat16())
    assert taken == [torch.float32]


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(**STRIDED), lambda: nn.GroupNorm(32, 64)], ids=["conv", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_autocast_they_are_pytorchs_own(make, dtype):
    plain = make().to(dtype)
    x = torch.randn(2, 64, 12, 12, dtype=dtype)
    want = plain(x)
    assert torch.equal(kept(plain)(x), want)


def test_the_norm_of_a_single_value_is_its_bias():
    layer: Any = kept(nn.GroupNorm(32, 32))
    with torch.no_grad():
        layer.bias.copy_(torch.arange(32.0))
    x = torch.randn(1, 32, 1, 1, requires_grad=True)
    for mode in (True, False):
        out = layer.train(mode)(x)
        assert torch.allclose(out.flatten(), torch.arange(32.0), atol=1e-3)
    x_grad, bias_grad = torch.autograd.grad(out.sum(), [x, layer.bias])
    assert torch.allclose(x_grad, torch.zeros(1), atol=1e-3) and torch.equal(bias_grad, torch.ones(32))


def test_attention_of_transformers_is_computed_in_float32(monkeypatch):
    detector, _ = build_detector(FAMILIES["d_fine"], CLASSES)
    taken, attention = [], nn.functional.scaled_dot_product_attention

    def spied(query, key, value, attn_mask=None, **more):
        taken.append({t.dtype for t in (query, key, value, attn_mask) if t is not None and t.is_floating_point()})
        return attention(query, key, value, attn_mask=attn_mask, **more)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spied)
    with torch.autocast("cpu", torch.bfloat16):
        detector.train().loss(batch(2))["loss"].backward()
    assert len(taken) > 1 and all(kinds == {torch.float32} for kinds in taken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_autocast_is_the_librarys_own(dtype):
    keep_attention_in_float32()
    module, (query, key, value) = nn.Module(), torch.randn(3, 2, 4, 20, 8, dtype=dtype)
    want, _ = sdpa_attention_forward(module, query, key, value, None, is_causal=False)
    got, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, is_causal=False)
    assert torch.equal(got, want) and got.dtype == dtype


@pytest.mark.parametrize(
    ("other", "does"),
    [
        ({}, True),
        ({"stride": 1}, False),
        ({"stride": 1, "kernel_size": 5}, True),
        ({"groups": 1}, False),
        ({"groups": 32}, False),
        ({"groups": 1, "in_channels": 1}, False),
        ({"out_channels": 128}, True),
    ],
)
def test_which_convolutions(other, does):
    assert (type(kept(nn.Conv2d(**STRIDED | other))) is Float32Conv2d) is does


@pytest.mark.parametrize(
    ("name", "convolutions", "norms"),
    [("torchvision/fcos_mobilenet_v3_small_fpn", 10, 8), ("transformers/d_fine", 29, 0)],
)
def test_a_detectors_slow_layers_are_kept(name, convolutions, norms):
    detector, _ = build_detector(ModelConfig(name=name, weights="none", fpn_channels=64), CLASSES)
    kinds = [type(module) for module in detector.modules()]
    assert (kinds.count(Float32Conv2d), kinds.count(Float32GroupNorm)) == (convolutions, norms)


NARROW = [
    {"stride": 2, "size": (1, 1)},
    {"stride": 2, "size": (10, 2)},
    {"stride": 2, "size": (20, 1)},
    {"stride": (1, 2), "size": (5, 1)},
    {"stride": 3, "size": (20, 2)},
    {"stride": 2, "size": (32, 3), "padding": "valid"},
    {"stride": 2, "size": (20, 3), "kernel_size": 2, "padding": 0},
    {"stride": 4, "size": (32, 3), "kernel_size": 7, "padding": 3},
    {"stride": 2, "size": (32, 4), "dilation": 2},
    {"stride": 1, "size": (10, 40), "in_channels": 24, "out_channels": 24, "groups": 24, "dilation": 2},
    {"stride": 4, "size": (16, 16), "in_channels": 24, "kernel_size": 4, "padding": 0},
]
"""What oneDNN 3.12 does wrongly on AMX."""


def fill(junk: float) -> None:
    """Memory that is free at once again, for the next one who does not write to what is given."""
    for size in (2**n for n in range(6, 20)):
        torch.full((size,), junk)


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_convolutions_in_bfloat16_are_right_whatever_memory_held_before(case):
    torch.manual_seed(0)
    options = STRIDED | {"groups": 1} | case
    height, width = options.pop("size")
    layer = kept(nn.Conv2d(**options))
    x = torch.randn(2, options["in_channels"], height, width).contiguous(memory_format=torch.channels_last)
    want = layer(x)
    grad = torch.randn_like(want)
    wanted = want, *torch.autograd.grad(want, [*layer.parameters()], grad)
    for _ in range(5):
        fill(1e30)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        got = out, *torch.autograd.grad(out, [*layer.parameters()], grad.bfloat16())
        for one, exact in zip(got, wanted, strict=True):
            assert (one.float() - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("case", "float32"),
    [({}, True), ({"size": (10, 3)}, False), ({"stride": (2, 1)}, False), ({"size": (10, 1), "stride": 1}, False)],
)
def test_only_answers_of_one_column_leave_bfloat16(case, float32, monkeypatch):
    options = STRIDED | {"groups": 1, "size": (10, 2)} | case
    size, taken, forward = options.pop("size"), [], nn.Conv2d._conv_forward
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda self, x, *more: taken.append(x.dtype) or forward(self, x, *more)
    )
    layer, x = kept(nn.Conv2d(**options)), torch.randn(2, 64, *size).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert (taken == [torch.float32]) is float32


@pytest.mark.parametrize("family", ["fcos", "retinanet"])
def test_a_narrow_canvas_gives_the_same_gradients_whatever_memory_held_before(family):
    detector, size = build(family).train(), np.array([[320, 64]], np.int32)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 320, 64, 3), np.uint8)
    boxes, labels = [np.array([[2, 2, 40, 90]], np.float32)], [np.array([0])]
    narrow = to_device(MicroBatch(0, 0, 0, pixels, size, size, np.array([1]), boxes, labels), CPU)
    found = []
    for junk in (1e30, float("nan"), 0.0):
        detector.zero_grad()
        torch.manual_seed(0)
        fill(junk)
        with torch.autocast("cpu", torch.bfloat16):
            loss = detector(narrow)["loss"]
        fill(junk)
        loss.backward()
        found.append(torch.cat([loss.detach().reshape(1), gradients(detector)]))
    assert torch.isfinite(found[0]).all() and torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
