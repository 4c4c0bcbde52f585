"""The backbone of every family, its learning rate, and what freezing leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import pad

from ray_det.config import ModelConfig, OptimConfig
from ray_det.models.build import build_detector
from ray_det.models.parts import backbone_of, compile_networks, freeze, sync_batch_norms
from ray_det.models.torchvision_backbones import FrozenBatchNorm
from ray_det.train.optim import build_optimizer, set_learning_rate
from ray_det.train.step import train_step
from ray_det.types import UserError
from tests.models.zoo import CLASSES, CPU, FAMILIES, batch, build, micro_batch


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_is_all_that_a_classifier_gave(family):
    """It ends where the pyramid or encoder begins, and the rest of the model can do without it."""
    detector = build(family)
    inside = {id(p) for p in backbone_of(detector, "").parameters()}
    names = [name for name, p in detector.named_parameters() if id(p) in inside]
    assert names and all(".backbone." in name and ".fpn." not in name for name in names)
    outside = [name for name, p in detector.named_parameters() if id(p) not in inside]
    assert outside and not any(".body." in name for name in outside)


@pytest.mark.parametrize("family", ["fcos", "d_fine"])
def test_the_backbone_has_its_own_rate_in_few_groups(family):
    detector = build(family)
    inside = {id(p) for p in backbone_of(detector, "").parameters()}
    for undecayed in (False, True):
        config = OptimConfig(lr=1e-3, backbone_lr_factor=0.1, decay_norms_and_biases=not undecayed)
        optimizer = build_optimizer(config, detector)
        assert len(optimizer.param_groups) == (4 if undecayed else 2)
        set_learning_rate(optimizer, 5e-4)
        assert optimizer.param_groups[0]["lr"] == 5e-4
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert rates.keys() == {id(p) for p in detector.parameters() if p.requires_grad}
        for p in filter(lambda p: p.requires_grad, detector.parameters()):
            assert rates[id(p)] == pytest.approx(5e-5 if id(p) in inside else 5e-4)
            assert decays[id(p)] == (0.0 if undecayed and p.ndim <= 1 else config.weight_decay)


@pytest.mark.parametrize(("family", "names"), [("fcos", ("backbone",)), ("d_fine", ("backbone", "model.encoder"))])
def test_what_is_frozen_stays(family, names):
    detector = build(family).train()
    freeze(detector, names)
    detector.train()
    modules = [backbone_of(detector, "")] + [detector.get_submodule(f"net.{name}") for name in names[1:]]
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
    optimizer = build_optimizer(OptimConfig(lr=1e-2), detector)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    rest = {name: p.detach().clone() for name, p in detector.named_parameters() if p.requires_grad}
    assert train_step(detector, optimizer, [micro_batch()], device=CPU, clip_norm=1.0, seed=0, global_step=0).applied
    for module, old in zip(modules, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())
        assert all(p.grad is None and id(p) not in held for p in module.parameters())
    assert any(not torch.equal(p, rest[name]) for name, p in detector.named_parameters() if name in rest)


def test_a_frozen_norm_normalises_with_what_it_knows():
    detector = build("fcos").train()
    with torch.no_grad():
        detector(batch(4))
    freeze(detector, ("backbone",))
    body, images = backbone_of(detector, ""), detector.normalise(batch(2))
    with torch.no_grad():
        in_training, in_eval = body(images), body.eval()(images)
    assert all(torch.equal(a, b) for a, b in zip(in_training.values(), in_eval.values(), strict=True))


def test_wrong_names_and_models_without_a_backbone_are_named():
    with pytest.raises(UserError, match="model.freeze: FCOS has no module 'backbone.bodi'; nearest: backbone.body"):
        freeze(build("fcos"), ("backbone.bodi",))
    with pytest.raises(UserError, match="model.freeze backbone,backbone.fpn,head leaves nothing to train"):
        freeze(build("fcos"), ("backbone", "backbone.fpn", "head"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ModelConfig(name="transformers/yolos", weights="none", config=sizes | {"image_size": [96, 128]})
    yolos, _ = build_detector(config, CLASSES)
    with pytest.raises(UserError, match="optim.backbone_lr_factor: YolosForObjectDetection has no backbone"):
        build_optimizer(OptimConfig(backbone_lr_factor=0.1), yolos)


@pytest.mark.parametrize("family", ["fcos", "d_fine"])
def test_norms_over_all_ranks_are_those_that_are_not_frozen(family):
    detector = build(family)
    freeze(detector, ("backbone",))
    names = set(detector.state_dict())
    kinds = {name: type(module) for name, module in detector.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert FrozenBatchNorm in kinds.values() and (family == "fcos" or nn.BatchNorm2d in kinds.values())
    sync_batch_norms(detector)
    for name, kind in kinds.items():
        assert type(detector.get_submodule(name)) is (FrozenBatchNorm if kind is FrozenBatchNorm else nn.SyncBatchNorm)
    assert set(detector.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_networks_give_the_same_losses_gradients_and_boxes(family):
    """With one and with three pictures; and most of the weights are in what is compiled.

    In float64: in float32 a change of the weights by 2e-7 alone moves gradients by 5 %, through batch norms.
    """
    eager, compiled = build(family).train().double(), build(family).train().double()
    inside = {id(p) for module in compiled.networks for p in module.parameters()}
    count = sum(p.numel() for p in compiled.parameters())
    assert sum(p.numel() for p in compiled.parameters() if id(p) in inside) > 0.8 * count
    names = set(compiled.state_dict())
    compile_networks(compiled, many_shapes=True)
    assert set(compiled.state_dict()) == names
    for images in (1, 3):
        found = []
        for detector in (eager, compiled):
            detector.zero_grad()
            torch.manual_seed(0)
            losses = detector.train()(batch(images))
            losses["loss"].backward()
            found.append({name: p.grad for name, p in detector.named_parameters() if p.grad is not None})
            found[-1]["loss"] = losses["loss"]
        assert found[0].keys() == found[1].keys()
        for name, value in found[0].items():
            assert torch.allclose(value, found[1][name], atol=1e-6 * float(value.abs().max()) + 1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_shapes_are_compiled_for_at_once(family):
    """Also where the first is square, and as many images as another size is. And a step is few pieces."""
    torch.compiler.reset()
    counters.clear()
    detector, pieces = build(family).train(), []
    compile_networks(detector, many_shapes=True, backend="eager")
    for images, (height, width) in enumerate(((256, 256), (320, 256), (320, 320), (224, 352)), start=2):
        one = batch(images)
        grow = (0, width - one.images_B3HW.shape[3], 0, height - one.images_B3HW.shape[2])
        one = replace(one, images_B3HW=pad(one.images_B3HW, grow), pixel_mask_BHW=pad(one.pixel_mask_BHW, grow))
        detector.loss(one)["loss"].backward()
        pieces.append(counters["stats"]["unique_graphs"])
    assert pieces == [pieces[0]] * 4
    assert pieces[0] <= 7  # D-FINE's were 21
