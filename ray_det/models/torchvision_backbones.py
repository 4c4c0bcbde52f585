"""Any torchvision classifier as a feature pyramid, and BatchNorm that stays as it was loaded.

Shape legend: B images, C channels, H W pixels of a feature map.
"""

from __future__ import annotations

import difflib
import warnings
from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from ray_det.types import UserError

EXAMPLES = (
    "resnet18, resnet50, mobilenet_v2, mobilenet_v3_small, efficientnet_b0, convnext_tiny, regnet_y_400mf, swin_t"
)
HEADS = ("avgpool", "classifier", "fc", "head", "heads")
"""Where torchvision's classifiers end; some of these layers would take a feature map without complaint."""
PROBE_HW = (128, 96)
"""Input with which strides are found; height and width differ so that channels-last maps are told apart."""


class Trunk(nn.Module):
    """A classifier's layers up to stride 32, giving the last feature map at each of the wanted strides.

    The layers keep the classifier's names, so that its weight files fit.

    Args:
        classifier: a torchvision classification model; its layers are taken over.
        strides: pixels per cell of the wanted maps, ascending.

    Raises:
        ValueError: the classifier's layers, called one after the other, do not give maps at these strides.
    """

    def __init__(self, classifier: nn.Module, strides: tuple[int, ...]) -> None:
        super().__init__()
        found, self.channels = _last_at_strides(classifier, strides)
        self.paths = _layer_paths(classifier)
        self.paths = self.paths[: self.paths.index(found[-1][0]) + 1]
        self.levels = dict(found)  # path -> is its map channels-last?
        for name, child in classifier.named_children():
            if any(path == name or path.startswith(f"{name}.") for path in self.paths):
                self.add_module(name, child)

    def forward(self, images_B3HW: Tensor) -> OrderedDict[str, Tensor]:
        """ "0", "1", ...: (B, C, H / stride, W / stride) of each stride."""
        x = images_B3HW
        maps: OrderedDict[str, Tensor] = OrderedDict()  # torch.compile cannot follow a call of OrderedDict[str, Tensor]
        for path in self.paths:
            x = self.get_submodule(path)(x)
            if path in self.levels:
                maps[str(len(maps))] = x.permute(0, 3, 1, 2) if self.levels[path] else x
        return maps


class Pyramid(nn.Module):
    """A trunk with a feature pyramid on top; stands in for torchvision's BackboneWithFPN."""

    def __init__(self, trunk: Trunk, out_channels: int, extra_blocks: ExtraFPNBlock) -> None:
        super().__init__()
        self.body = trunk
        self.fpn = FeaturePyramidNetwork(trunk.channels, out_channels, extra_blocks)
        self.out_channels = out_channels

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(images_B3HW))


def build_trunk(backbone: str, strides: tuple[int, ...]) -> Trunk:
    """A freshly initialised torchvision classifier as a trunk.

    Raises:
        UserError: torchvision has no such backbone (the nearest is named), or it has no pyramid.
    """
    known = models.list_models(module=models)
    if backbone not in known:
        near = difflib.get_close_matches(backbone, known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; try one of {EXAMPLES}"
        raise UserError(f"torchvision has no backbone '{backbone}'{hint}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # googlenet and inception, about their initialisation
        classifier = models.get_model(backbone, weights=None)
    try:
        return Trunk(classifier, strides)
    except ValueError as error:
        raise UserError(f"backbone '{backbone}' has no feature pyramid: {error}; try one of {EXAMPLES}") from None


class FrozenBatchNorm(nn.BatchNorm2d):
    """BatchNorm with fixed statistics and affine terms, one fused call in every precision."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def freeze_batchnorm(module: nn.Module, eps: float | None = None) -> None:
    """Make every BatchNorm2d inside `module` a FrozenBatchNorm, in place. `eps`: instead of each layer's own."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = FrozenBatchNorm
            layer.requires_grad_(False)
            layer.eps = layer.eps if eps is None else eps


def _layer_paths(classifier: nn.Module) -> list[str]:
    """Names of the layers in order up to the classifier's head, with top-level Sequentials opened."""
    paths: list[str] = []
    for name, child in classifier.named_children():
        if name in HEADS:
            break
        opened = isinstance(child, nn.Sequential)
        paths += [f"{name}.{i}" for i, _ in child.named_children()] if opened else [name]
    return paths


@torch.no_grad()
def _last_at_strides(classifier: nn.Module, strides: tuple[int, ...]) -> tuple[list[tuple[str, bool]], list[int]]:
    """The last layer at each stride with whether its map is channels-last, and the channels of the maps."""
    height, width = PROBE_HW
    last: dict[int, tuple[str, bool, int]] = {}
    training = classifier.training
    classifier.eval()
    x = torch.zeros(1, 3, height, width)
    for path in _layer_paths(classifier):
        try:
            x = cast(Tensor, classifier.get_submodule(path)(x))
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError):
            break
        if x.ndim != 4:
            break
        for stride in strides:
            size = (height // stride, width // stride)
            if tuple(x.shape[2:]) == size or tuple(x.shape[1:3]) == size:
                channels_last = tuple(x.shape[2:]) != size
                last[stride] = (path, channels_last, x.shape[3 if channels_last else 1])
    classifier.train(training)
    if missing := [s for s in strides if s not in last]:
        raise ValueError(f"no feature map at stride {', '.join(map(str, missing))}")
    return [last[s][:2] for s in strides], [last[s][2] for s in strides]
