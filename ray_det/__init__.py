"""Distributed training of object detectors on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ray_det.predict.predictor import Predictor


def load(
    location: str, device: str | None = None, precision: Literal["auto", "fp32", "bf16"] | None = None
) -> Predictor:
    """The detector of a run folder (its best checkpoint) or of a checkpoint, ready to predict in this process.

    Args:
        location: local path or URI.
        device: torch's name of it; default: a GPU where there is one.
        precision: of the network, as `--train.precision`; default: as it was trained.

    Raises:
        UserError: there is no checkpoint, or a broken one.
    """
    import torch  # loader processes import this package, and not torch

    from ray_det.predict.predictor import Predictor, open_checkpoint

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Predictor(open_checkpoint(str(location)), torch.device(name), precision=precision)
