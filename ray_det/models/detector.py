"""What every detector offers, whatever library it comes from.

A detector lives in canvas pixels: it gets uint8 images that lie top-left on a common canvas, their real sizes and
boxes on that canvas, and answers with losses or with boxes on that canvas. Mapping to the pixels of the stored image
is the caller's work (`ray_det.evaluate.inference`).

Shape legend: B images, H W canvas pixels, N boxes of one image.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from ray_det.types import IMAGENET_MEAN, MicroBatch, UserError

ONE_VALUE = "Expected more than 1 value per channel when training"
"""How torch begins what it says of a batch norm without a variance; the shape of its input follows."""


class Target(TypedDict):
    """Ground truth of one image, with torchvision's keys."""

    boxes: Tensor  # float32 (N, 4) xyxy in canvas pixels
    labels: Tensor  # int64 (N,) contiguous labels 0..C-1
    image_id: Tensor  # int64 ()
    area: Tensor  # float32 (N,) canvas pixels
    iscrowd: Tensor  # int64 (N,), zeros: crowds are never training targets
    orig_size: Tensor  # int64 (2,) (h, w) of the stored image
    size: Tensor  # int64 (2,) (h, w) of the real pixels on the canvas


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device."""

    images_B3HW: Tensor  # uint8, RGB
    pixel_mask_BHW: Tensor  # bool, True = real pixel
    sizes: list[tuple[int, int]]  # (h, w) of the real pixels, on the host
    targets: list[Target]


class Prediction(TypedDict):
    """Detections of one image in canvas pixels, best score first."""

    boxes: Tensor  # float32 (N, 4) xyxy
    scores: Tensor  # float32 (N,)
    labels: Tensor  # int64 (N,) contiguous labels 0..C-1


class Detector(nn.Module):
    """Base of the adapters: owns the normalisation and the padding value, knows neither Ray nor COCO.

    Args:
        mean, std: the model's own normalisation of 0..1 RGB; (0, 0, 0) and (1, 1, 1) where it takes plain 0..1.
        pad: the RGB value in 0..1, before normalisation, that padded pixels stand for.
    """

    size_divisor: int = 32
    """Canvas heights and widths are multiples of this."""
    loss_names: tuple[str, ...] = ()
    """Keys of `loss()` beside "loss": always all of them, so that ranks can reduce them together."""
    architecture: dict[str, Any]
    """JSON: all that is needed, with the class list, to build the same module again without weights or network."""

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pad: tuple[float, ...] = IMAGENET_MEAN,
    ) -> None:
        super().__init__()
        for name, value in (("_mean", mean), ("_std", std), ("_pad", pad)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    @property
    @abstractmethod
    def backbone(self) -> nn.Module | None:
        """The part that is a classifier's, without pyramid or encoder; None: there is no such part."""

    @property
    @abstractmethod
    def networks(self) -> list[nn.Module]:
        """The parts that take tensors to tensors, and most of the time: what `torch.compile` is for."""

    def normalise(self, batch: Batch) -> Tensor:
        """float32 (B, 3, H, W): the model's input. Padded pixels hold exactly `pad` under the normalisation."""
        mean, std, pad = self.get_buffer("_mean"), self.get_buffer("_std"), self.get_buffer("_pad")
        images = (batch.images_B3HW.float() / 255 - mean) / std
        return torch.where(batch.pixel_mask_BHW[:, None], images, (pad - mean) / std)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, under the name that DistributedDataParallel calls.

        Raises:
            UserError: a batch norm in training has one value per channel, and so no variance.
        """
        try:
            return self.loss(batch)
        except ValueError as error:
            if not str(error).startswith(ONE_VALUE):
                raise
            raise _too_few_values(batch, str(error)) from error

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a micro-batch, averaged as the model's paper says, over this micro-batch alone.

        Returns:
            "loss", a float32 scalar that sums what is optimised, and every key of `loss_names`, weighted and detached,
            which together add up to it. All trainable parameters are part of the graph, also when no image has a box.
        """

    @abstractmethod
    def predict(self, batch: Batch) -> list[Prediction]:
        """Detections of every image; call in eval mode, under `torch.inference_mode()`."""

    def loss_and_predict(self, batch: Batch) -> tuple[dict[str, Tensor], list[Prediction]]:
        """Both, in eval mode without gradients; adapters share the forward pass where the model allows it."""
        return self.loss(batch), self.predict(batch)


def to_device(micro: MicroBatch, device: torch.device) -> Batch:
    """Copy pixels, boxes and labels to the device, in two copies that the host does not wait for.

    What only bookkeeping reads stays on the host.
    """
    pixels = torch.from_numpy(micro.pixels_BHW3)
    if device.type == "cuda" and not pixels.is_pinned():
        pixels = pixels.pin_memory()
    images_B3HW = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)
    height, width = micro.pixels_BHW3.shape[1:3]
    sizes = [(int(h), int(w)) for h, w in micro.sizes_B2]
    sizes_B2, boxes, labels = _annotations(micro, device)
    return Batch(images_B3HW, pixel_mask(sizes_B2, height, width), sizes, _targets(micro, boxes, labels))


def _too_few_values(batch: Batch, problem: str) -> UserError:
    channels = re.findall(r"\d+", problem.removeprefix(ONE_VALUE))[1]
    images, _, height, width = batch.images_B3HW.shape
    return UserError(
        f"BatchNorm has one value for each of its {channels} channels, which has no variance: a micro-batch of "
        f"{images} image{'s' * (images > 1)} of {height} x {width} pixels is too little, raise "
        "train.micro_batch_size or data.image_size"
    )


def pixel_mask(sizes_B2: Tensor, height: int, width: int) -> Tensor:
    """bool (B, H, W), True where a pixel is real."""
    rows = torch.arange(height, device=sizes_B2.device) < sizes_B2[:, :1]
    columns = torch.arange(width, device=sizes_B2.device) < sizes_B2[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def _annotations(micro: MicroBatch, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Sizes int64 (B, 2), and of every image boxes float32 (N, 4) and labels int64 (N,): views of one copy."""
    counts = [len(labels) for labels in micro.labels_N]
    boxes = np.ascontiguousarray(np.concatenate(micro.boxes_N4), np.float32).view(np.int64)
    parts = [part.ravel() for part in (micro.sizes_B2, np.concatenate(micro.labels_N), boxes)]
    packed = torch.from_numpy(np.concatenate(parts, dtype=np.int64)).to(device, non_blocking=True)
    sizes, labels, boxes = packed.split([len(part) for part in parts])
    return sizes.view(-1, 2), boxes.view(torch.float32).view(-1, 4).split(counts), labels.split(counts)


def _targets(micro: MicroBatch, boxes: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> list[Target]:
    """Every image's. What they share is made at once, and cut: a tensor for each would be a millisecond per batch."""
    counts = [len(one) for one in labels]
    x0, y0, x1, y1 = torch.from_numpy(np.concatenate(micro.boxes_N4)).unbind(-1)
    columns: dict[str, Sequence[Tensor]] = {
        "boxes": boxes,
        "labels": labels,
        "image_id": torch.from_numpy(micro.image_ids_B).unbind(),
        "area": ((x1 - x0) * (y1 - y0)).split(counts),
        "iscrowd": torch.zeros(sum(counts), dtype=torch.int64).split(counts),
        "orig_size": torch.from_numpy(micro.orig_sizes_B2.astype(np.int64)).unbind(),
        "size": torch.from_numpy(micro.sizes_B2.astype(np.int64)).unbind(),
    }
    return [Target(**dict(zip(columns, one, strict=True))) for one in zip(*columns.values(), strict=True)]
