"""What training changes about a detector's parts: what is frozen, compiled, or normalised over all ranks."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes

from ray_det.models.detector import Detector
from ray_det.models.torchvision_backbones import FrozenBatchNorm, freeze_batchnorm
from ray_det.types import UserError

BACKBONE = "backbone"


def backbone_of(detector: Detector, option: str) -> nn.Module:
    """Raises UserError, with the option's name: the detector has none."""
    if detector.backbone is None:
        kind = type(detector.get_submodule("net")).__name__
        raise UserError(f"{option}: {kind} has no backbone apart from the rest of the model")
    return detector.backbone


def compile_networks(detector: Detector, *, many_shapes: bool, **options: Any) -> None:
    """`torch.compile` in place: the names of weights stay. Its first calls take minutes.

    Args:
        many_shapes: batches differ in canvas or size, which are symbols from the first compilation on. Otherwise the
            first shape is a constant, and compiled for better; a second one would be compiled for as a symbol.
        options: more arguments of `torch.compile`.
    """
    # D-FINE and RT-DETR check a tensor's value in every layer, which would cut their decoder into pieces.
    torch._dynamo.config.capture_scalar_outputs = True
    # Sides that are equal by chance, as those of a square canvas, would be one symbol, and others compiled for anew.
    symbolic_shapes.use_duck_shape = False
    for module in detector.networks:
        module.compile(dynamic=True if many_shapes else None, **options)


def sync_batch_norms(detector: Detector) -> None:
    """Make every batch norm that is not frozen one over all ranks (arXiv:1803.08904)."""
    for parent in list(detector.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d) and not isinstance(child, FrozenBatchNorm):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def freeze(detector: Detector, names: tuple[str, ...]) -> None:
    """Keep the weights of some modules as they are, and their batch norms in eval mode.

    Args:
        names: `backbone`, or names of modules inside the library's network (`backbone.body.conv1`).

    Raises:
        UserError: an unknown name (the nearest are named), or nothing is left to train.
    """
    net = detector.get_submodule("net")
    known = {name: module for name, module in net.named_modules() if name}
    for name in names:
        if name == BACKBONE:
            module = backbone_of(detector, "model.freeze")
        elif name in known:
            module = known[name]
        else:
            near = difflib.get_close_matches(name, [BACKBONE, *known], n=3, cutoff=0)
            raise UserError(f"model.freeze: {type(net).__name__} has no module '{name}'; nearest: {', '.join(near)}")
        module.requires_grad_(False)
        freeze_batchnorm(module)
    if not any(p.requires_grad for p in detector.parameters()):
        raise UserError(f"model.freeze {','.join(names)} leaves nothing to train")
