"""From `torchvision/<name>` and its arguments to a network.

The architecture that a checkpoint keeps: {"library": "torchvision", "name", "fpn_channels", "config", "frozen"
("", "backbone.body" or "all": the part whose BatchNorm is frozen), "eps" (of frozen norms, null: each layer's own),
"anchors": true}. Without the last it is of a time when Faster R-CNN had its default anchors whatever "config" said.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum, detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ray_det.models.detector import Detector
from ray_det.models.precision import keep_in_float32
from ray_det.models.torchvision_adapter import DenseDetector, TwoStageDetector
from ray_det.models.torchvision_backbones import Pyramid, build_trunk, freeze_batchnorm
from ray_det.models.weights import WeightsReport, load_weights, read_weights
from ray_det.models.winograd import use_winograd
from ray_det.types import UserError

BUILDERS = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
)
"""torchvision's own detectors; for these it has COCO weights."""
FAMILIES: dict[str, type[nn.Module]] = {
    "fcos": detection.FCOS,
    "retinanet": detection.RetinaNet,
    "fasterrcnn": detection.FasterRCNN,
}
OWN_ANCHORS = (
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn_v2",
)
"""Builders that pass an anchor generator of theirs and take no other."""
NO_EPS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
"""Detectors whose published weights were trained with frozen norms without epsilon (pytorch/vision#2933)."""
BODY = "backbone.body"
DEFAULTS = {"score_thresh": 0.05, "detections_per_img": 100}
HIDDEN = ("self", "backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "kwargs")
MODULES = ("anchor_generator", "rpn_anchor_generator", "head", "rpn_head", "proposal_matcher", "box_roi_pool")
EXTRA = ("anchor_sizes", "aspect_ratios")
LEVELS = 5
"""Of every pyramid but those of `OWN_ANCHORS`."""


def build_torchvision(
    name: str, fpn_channels: int, config: dict[str, Any], weights: str, num_classes: int, pad: tuple[float, ...]
) -> tuple[Detector, WeightsReport | None]:
    """A detector by name, with the weights asked for; BatchNorm that got weights is frozen.

    Raises:
        UserError: unknown name or argument (the nearest is named), weights that cannot be had or do not fit.
    """
    network = library_network(name, fpn_channels, config, num_classes)
    report, eps = None, None
    if weights == "default":
        enum = _published(name, fpn_channels)
        report = load_weights(network, _download(name, enum), f"{enum.url.rsplit('/', 1)[-1]}")
        eps = 0.0 if name in NO_EPS and fpn_channels == 256 else None
    elif weights != "none":
        report = load_weights(network, read_weights(weights), weights)
    frozen = _loaded_part(network, report)
    architecture = {"library": "torchvision", "name": name, "fpn_channels": fpn_channels, "config": config}
    return _adapter(network, architecture | {"frozen": frozen, "eps": eps, "anchors": True}, pad), report


def rebuild_torchvision(architecture: dict[str, Any], num_classes: int, pad: tuple[float, ...]) -> Detector:
    """The module that `build_torchvision` gave, without its weights."""
    name, channels, config = (architecture[k] for k in ("name", "fpn_channels", "config"))
    if "anchors" not in architecture and name.startswith("fasterrcnn"):
        config = {key: value for key, value in config.items() if key not in EXTRA}
    return _adapter(library_network(name, channels, config, num_classes), architecture, pad)


def _adapter(network: nn.Module, architecture: dict[str, Any], pad: tuple[float, ...]) -> Detector:
    if frozen := architecture["frozen"]:
        freeze_batchnorm(network if frozen == "all" else network.get_submodule(frozen), architecture["eps"])
    use_winograd(network)
    keep_in_float32(network)
    if isinstance(network, detection.FasterRCNN):
        return TwoStageDetector(network, architecture, pad)
    return DenseDetector(cast("detection.FCOS | detection.RetinaNet", network), architecture, pad)


def library_network(name: str, fpn_channels: int, config: dict[str, Any], num_classes: int) -> nn.Module:
    """torchvision's own module, as torchvision computes it, with random weights."""
    if name in BUILDERS and fpn_channels == 256:
        family = name.split("_", 1)[0]
        builder = cast(Callable[..., nn.Module], models.get_model_builder(name))
        if name in OWN_ANCHORS and any(map(config.get, EXTRA)):
            raise UserError(
                f"model.config: torchvision/{name} has anchors of its own, it takes no {' or '.join(EXTRA)}"
            )
        arguments = _arguments(name, config)
        return _call(
            lambda: builder(
                weights=None, weights_backbone=None, num_classes=num_classes + (family == "fasterrcnn"), **arguments
            ),
            name,
        )
    family, backbone = _parse(name)
    if family == "fcos" and fpn_channels % 32:
        raise UserError(f"model.fpn_channels {fpn_channels}: the norms of FCOS need a multiple of 32")
    if family == "fasterrcnn":
        pyramid = Pyramid(build_trunk(backbone, (4, 8, 16, 32)), fpn_channels, LastLevelMaxPool())
        num_classes += 1
    else:
        extra = LastLevelP6P7(fpn_channels, fpn_channels)
        pyramid = Pyramid(build_trunk(backbone, (8, 16, 32)), fpn_channels, extra)
    return _call(lambda: FAMILIES[family](pyramid, num_classes, **_arguments(name, config)), name)


def _call(build: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        return build()
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"model.config does not fit torchvision/{name}: {error}") from error


def _parse(name: str) -> tuple[str, str]:
    """(family, backbone) of `<family>_<backbone>_fpn`."""
    family, _, rest = name.partition("_")
    if family in FAMILIES and rest.endswith("_fpn"):
        return family, rest.removesuffix("_fpn")
    candidates = [*BUILDERS, *(f"{f}_{b}_fpn" for f in FAMILIES for b in models.list_models(module=models))]
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(BUILDERS)}"
    raise UserError(
        f"unknown model 'torchvision/{name}': {hint} (or <{'|'.join(FAMILIES)}>_<torchvision backbone>_fpn)"
    )


def _arguments(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of torchvision's class: short names, JSON lists and anchors translated."""
    family = name.split("_", 1)[0]
    prefix = "box_" if family == "fasterrcnn" else ""
    accepted = set(inspect.signature(FAMILIES[family].__init__).parameters) - {*HIDDEN, *MODULES}
    arguments: dict[str, Any] = {}
    for key, value in (DEFAULTS | config).items():
        if key in EXTRA:
            continue
        long = key if key in accepted else prefix + key
        if long not in accepted:
            known = sorted([*accepted, *EXTRA])
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise UserError(f"model.config: torchvision's {family} has no argument '{key}'; nearest: {near[0]}")
        arguments[long] = value
    sizes, ratios = map(config.get, EXTRA)
    if sizes or ratios:
        generator = "rpn_anchor_generator" if family == "fasterrcnn" else "anchor_generator"
        arguments[generator] = _anchors(name, sizes, ratios or ([1.0] if family == "fcos" else [0.5, 1.0, 2.0]))
    return arguments


def _anchors(name: str, sizes: Any, ratios: Any) -> AnchorGenerator:
    """Anchors of every level: `sizes` and `aspect_ratios` are a list per level, or one ratio list for all."""
    if not sizes:
        raise UserError("model.config: aspect_ratios need anchor_sizes, a list for every pyramid level")
    sizes_L, ratios_L = _rows("anchor_sizes", sizes), _rows("aspect_ratios", ratios)
    if not any(isinstance(ratio, list | tuple) for ratio in ratios):
        ratios_L = (tuple(ratios),) * len(sizes_L)
    if len({len(s) * len(r) for s, r in zip(sizes_L, ratios_L, strict=False)}) != 1 or len(sizes_L) != len(ratios_L):
        raise UserError("model.config: anchor_sizes and aspect_ratios must give every level equally many anchors")
    if len(sizes_L) != LEVELS:
        raise UserError(f"model.config: anchor_sizes for {len(sizes_L)} levels, torchvision/{name} has {LEVELS}")
    return AnchorGenerator(sizes_L, ratios_L)


def _rows(key: str, value: Any) -> tuple[tuple[float, ...], ...]:
    """The numbers of every entry of a list; a number is a list of one."""
    rows = [row if isinstance(row, list | tuple) else [row] for row in value] if isinstance(value, list | tuple) else []
    numbers = [number for row in rows for number in row]
    if not rows or not all(rows) or not all(type(n) in (int, float) and 0 < n < math.inf for n in numbers):
        raise UserError(f"model.config: {key} {value!r}: expected a list of positive numbers or of lists of them")
    return tuple(map(tuple, rows))


def _published(name: str, fpn_channels: int) -> WeightsEnum:
    """COCO weights of the whole detector, or ImageNet weights of its backbone."""
    whole = name in BUILDERS and fpn_channels == 256
    return cast(Any, models.get_model_weights(name if whole else _parse(name)[1])).DEFAULT


def _download(name: str, weights: WeightsEnum) -> dict[str, Tensor]:
    """From torch's cache or the network.

    Raises:
        UserError: neither has them.
    """
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise UserError(
            f"the default weights of torchvision/{name} ({weights.url}) are not cached and cannot be downloaded: "
            f"{error}; --model.weights none or a local file works without a network"
        ) from None


def _loaded_part(network: nn.Module, report: WeightsReport | None) -> str:
    """The part of the network all of whose BatchNorms were loaded: "all", "backbone.body" or ""."""
    if report is None:
        return ""
    absent = {key.rpartition(".")[0] for key in (*report.missing, *report.remade)}
    norms = [name for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    if not absent.intersection(norms):
        return "all"
    return BODY if not any(n in absent for n in norms if n.startswith(BODY)) else ""
