"""From the configuration to a detector: the only place that knows the libraries' names.

Each library is imported when a detector of it is built: they take seconds, in every worker.
"""

from __future__ import annotations

from typing import Any, Literal

from ray_det.config import ModelConfig
from ray_det.models.detector import Detector
from ray_det.models.weights import WeightsReport
from ray_det.types import IMAGENET_MEAN, ClassList, UserError


def build_detector(
    config: ModelConfig,
    classes: ClassList,
    *,
    padding: Literal["mean", "zero"] = "mean",
    architecture: dict[str, Any] | None = None,
) -> tuple[Detector, WeightsReport | None]:
    """A detector for these classes, and what became of the weights asked for (None: random initialisation).

    Args:
        config: name, weights and the library's own arguments. Ignored where `architecture` is given.
        classes: only their number and order matter.
        padding: padded pixels stand for ImageNet's mean, or for black, before the model's normalisation.
        architecture: `detector.architecture` of an earlier build, as kept in a checkpoint: the same module is built
            again without weights, hub or network.

    Raises:
        UserError: unknown name or argument, weights that cannot be read, reached or fitted.
    """
    pad = IMAGENET_MEAN if padding == "mean" else (0.0, 0.0, 0.0)
    if architecture is not None:
        return _rebuild(architecture, classes, pad), None
    library, _, name = config.name.partition("/")
    if library == "torchvision" and name:
        from ray_det.models.torchvision_build import build_torchvision

        return build_torchvision(name, config.fpn_channels, config.config, config.weights, len(classes), pad)
    if library == "transformers" and name:
        from ray_det.models.transformers_build import build_transformers

        return build_transformers(name, config.config, config.weights, classes, pad)
    raise UserError(f"unknown model '{config.name}': torchvision/<detector> or transformers/<hub id | folder | type>")


def _rebuild(architecture: dict[str, Any], classes: ClassList, pad: tuple[float, ...]) -> Detector:
    if architecture["library"] == "transformers":
        from ray_det.models.transformers_build import rebuild_transformers

        return rebuild_transformers(architecture, classes, pad)
    from ray_det.models.torchvision_build import rebuild_torchvision

    return rebuild_torchvision(architecture, len(classes), pad)
