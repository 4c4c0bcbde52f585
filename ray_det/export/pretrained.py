"""Weights in a folder that needs none of this package: for `from_pretrained`, or under torchvision's own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel

from ray_det.models.detector import Detector
from ray_det.models.transformers_adapter import TransformersDetector

COUNTER = "num_batches_tracked"
"""A buffer of BatchNorm; the library's frozen norms, in whose place ours are, have none."""


def write_pretrained(detector: Detector, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`.

    Of a transformers model: what `AutoModelForObjectDetection.from_pretrained(folder)` loads, with names of classes.
    Of a torchvision model: the weights under torchvision's names, and the arguments that the model is built with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(detector, TransformersDetector):
        network = cast(PreTrainedModel, detector.net)
        weights = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(COUNTER)}
        network.save_pretrained(folder, state_dict=weights)
        return
    save_model(cast(nn.Module, detector.get_submodule("net")), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(detector.architecture, indent=1))
