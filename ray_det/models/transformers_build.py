"""From `transformers/<hub id | folder | model type>` and configuration fields to a network.

The architecture that a checkpoint keeps: {"library": "transformers", "config" (the whole configuration, JSON),
"mean", "std", "frozen" (whether the backbone's BatchNorm is)}.
"""

from __future__ import annotations

import difflib
import json
import logging
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from ray_det.models.torchvision_adapter import IMAGENET_STD
from ray_det.models.torchvision_backbones import FrozenBatchNorm
from ray_det.models.transformers_adapter import TransformersDetector
from ray_det.models.weights import WeightsReport, load_weights, read_weights
from ray_det.types import IMAGENET_MEAN, ClassList, UserError

PLAIN = ("d_fine", "rt_detr", "rt_detr_v2", "deimv2")
"""Model types that take plain 0..1 where no preprocessor_config.json says otherwise."""
TYPES = (
    *PLAIN,
    "detr",
    "conditional_detr",
    "deformable_detr",
    "dab-detr",
    "table-transformer",
    "lw_detr",
    "rf_detr",
    "yolos",
)
OWNED = ("num_labels", "id2label", "label2id")
"""Fields that follow from the data set."""


def build_transformers(
    name: str, overrides: dict[str, Any], weights: str, classes: ClassList, pad: tuple[float, ...]
) -> tuple[TransformersDetector, WeightsReport | None]:
    """A detector by hub id, folder or model type, with the weights asked for.

    BatchNorm of the backbone is frozen where its weights were loaded, as in these models' recipes.

    Raises:
        UserError: unknown name or field (the nearest is named), weights that cannot be had or do not fit.
    """
    base = _config(name)
    if base.model_type not in TYPES:
        raise UserError(f"model type '{base.model_type}' is not one of {', '.join(TYPES)}")
    if hasattr(base, "auxiliary_loss"):  # published DETR configurations switch it off after training
        overrides = {"auxiliary_loss": True} | overrides
    config = with_labels(override(base, overrides, "model.config"), classes)
    network = _network(config, name)
    report = None
    if weights == "default":
        if name in TYPES:
            raise UserError(
                f"transformers/{name} is a configuration without weights: --model.weights none or a file, or a hub id"
            )
        report = load_weights(network, _pretrained(name, base).state_dict(), name)
    elif weights != "none":
        report = load_weights(network, read_weights(weights), weights)
    frozen = report is not None and _norms_loaded(network, report)
    mean, std = normalisation(name, config.model_type)
    architecture = {"library": "transformers", "config": _to_json(config), "mean": mean, "std": std, "frozen": frozen}
    return _detector(network, architecture, pad), report


def rebuild_transformers(
    architecture: dict[str, Any], classes: ClassList, pad: tuple[float, ...]
) -> TransformersDetector:
    """The module that `build_transformers` gave, without its weights."""
    fields = architecture["config"]
    config = with_labels(CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields)), classes)
    return _detector(_network(config, fields["model_type"]), architecture, pad)


def override(config: PreTrainedConfig, changes: dict[str, Any], where: str) -> PreTrainedConfig:
    """The configuration with some fields changed, also inside nested configurations.

    Raises:
        UserError: an unknown field (the nearest is named), a value that the library refuses.
    """
    fields = _merge(_to_json(config), changes, where, dict(config.attribute_map))
    if "head_dim" not in changes:  # D-FINE derives it, and would take the old one for the user's wish
        fields.pop("head_dim", None)
    try:
        return type(config).from_dict(fields)
    except Exception as error:  # the library's strict dataclasses raise errors of their own kinds
        raise UserError(f"{where}: {_first_line(error)}") from error


def with_labels(config: PreTrainedConfig, classes: ClassList) -> PreTrainedConfig:
    """The configuration for these classes and for any canvas: no position or anchor is fixed to one size."""
    config.id2label = dict(enumerate(classes.distinct_names))
    config.label2id = {name: i for i, name in config.id2label.items()}
    for field in ("eval_size", "anchor_image_size"):
        if hasattr(config, field):
            setattr(config, field, None)
    return config


def normalisation(name: str, model_type: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the model's input: as its image processor says, or by model type."""
    plain = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    settings = _processor_settings(name)
    if settings is not None and "do_normalize" in settings:
        if not settings["do_normalize"]:
            return plain
        return tuple(settings.get("image_mean", IMAGENET_MEAN)), tuple(settings.get("image_std", IMAGENET_STD))
    return plain if model_type in PLAIN else (IMAGENET_MEAN, IMAGENET_STD)


def _processor_settings(name: str) -> dict[str, Any] | None:
    if name in TYPES:
        return None
    try:
        file = cached_file(name, "preprocessor_config.json")
    except (OSError, ValueError):
        return None
    return json.loads(Path(file).read_text()) if file else None


def _detector(network: PreTrainedModel, architecture: dict[str, Any], pad: tuple[float, ...]) -> TransformersDetector:
    settle_norms(network, architecture["frozen"])
    return TransformersDetector(network, architecture, tuple(architecture["mean"]), tuple(architecture["std"]), pad)


def settle_norms(network: PreTrainedModel, frozen: bool) -> None:
    """Replace the library's frozen norms by fused ones, or, with fresh weights, make the backbone trainable at all.

    A frozen norm with fresh statistics normalises nothing, and DETR freezes its first stage whether trained or not.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("FrozenBatchNorm2d"):
                parent.add_module(name, _unfrozen(child, frozen))
    if not frozen:
        for name, parameter in network.named_parameters():
            if ".backbone." in f".{name}":
                parameter.requires_grad_(True)


def _unfrozen(norm: nn.Module, frozen: bool) -> nn.BatchNorm2d:
    state = norm.state_dict()
    new = (FrozenBatchNorm if frozen else nn.BatchNorm2d)(len(state["weight"]), eps=getattr(norm, "eps", 1e-5))
    new.load_state_dict(state, strict=False)
    return new.requires_grad_(not frozen)


def _norms_loaded(network: nn.Module, report: WeightsReport) -> bool:
    absent = {key.rpartition(".")[0] for key in (*report.missing, *report.remade)}
    norms = [n for n, m in network.named_modules() if type(m).__name__.endswith("FrozenBatchNorm2d")]
    return not absent.intersection(norms)


def _network(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """Freshly initialised, on the CPU, in float32."""
    try:
        network = cast(PreTrainedModel, AutoModelForObjectDetection.from_config(config))
    except (ImportError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"transformers/{name} cannot be built: {_first_line(error)}") from error
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # RT-DETR draws its scales from N(0, 0.01)
            nn.init.ones_(module.weight)
    return network.float()


def _config(name: str) -> PreTrainedConfig:
    if name in TYPES and not Path(name).is_dir():
        config = CONFIG_MAPPING[name]()
        if getattr(getattr(config, "backbone_config", None), "model_type", "") == "timm_backbone":
            stages = ["stage2", "stage3", "stage4"] if name == "deformable_detr" else ["stage4"]
            backbone = {"model_type": "resnet", "out_features": stages}
            config = CONFIG_MAPPING[name].from_dict({"use_timm_backbone": False, "backbone_config": backbone})
        return config
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        near = difflib.get_close_matches(name, TYPES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"a hub id (owner/name) or one of {', '.join(TYPES)}"
        raise UserError(f"unknown model 'transformers/{name}': no such folder or model type; {hint}")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise _unreachable(name, "configuration", error) from None


def _pretrained(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The published network as it is, other classes and all."""
    noisy = logging.getLogger("transformers.modeling_utils")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        return AutoModelForObjectDetection.from_pretrained(name, config=config, dtype="float32")
    except Exception as error:  # broken and hostile files bring pickle's and safetensors' own kinds
        raise _unreachable(name, "weights", error) from None
    finally:
        noisy.setLevel(level)


def _unreachable(name: str, what: str, error: Exception) -> UserError:
    if Path(name).is_dir():
        return UserError(f"the {what} in the folder {name} cannot be read: {_first_line(error)}")
    return UserError(
        f"the {what} of '{name}' can be had neither from the local cache nor from the hub ({_first_line(error)}); "
        "without a network a local folder or file works, or a model type (transformers/d_fine) with "
        "--model.weights none"
    )


def _merge(fields: dict[str, Any], changes: dict[str, Any], where: str, aliases: dict[str, str]) -> dict[str, Any]:
    merged = dict(fields)
    for given, value in changes.items():
        key = aliases.get(given, given)
        if key in OWNED:
            raise UserError(f"{where}: {given} follows from the data set's classes")
        if key not in fields:
            near = difflib.get_close_matches(given, [*fields, *aliases], n=1, cutoff=0)
            raise UserError(f"{where}: no field '{given}'; nearest: {near[0]}")
        if isinstance(value, dict) and isinstance(fields[key], dict):
            value = _merge_nested(fields[key], value, f"{where}.{given}")
        merged[key] = value
    return merged


def _merge_nested(fields: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    kind = str(changes.get("model_type", fields.get("model_type", "")))
    if kind != fields.get("model_type", ""):
        if kind not in CONFIG_MAPPING:
            near = difflib.get_close_matches(kind, list(CONFIG_MAPPING), n=1, cutoff=0)
            raise UserError(f"{where}: no model type '{kind}'; nearest: {near[0]}")
        fields = _to_json(CONFIG_MAPPING[kind]())
    merged = _merge(fields, changes, where, dict(CONFIG_MAPPING[kind].attribute_map) if kind else {})
    if {"out_features", "out_indices"} & changes.keys():  # two names of one choice: the given one decides
        for field in {"out_features", "out_indices"} - changes.keys():
            merged.pop(field, None)
    merged.pop("stage_names", None)
    return merged


def _to_json(config: PreTrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def _first_line(error: Exception) -> str:
    """The message, with a heading that only announces it joined to what follows."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
