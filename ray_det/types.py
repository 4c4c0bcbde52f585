"""Plain values that travel between the rooms. NumPy only: loader processes never import torch.

Shape legend: B images of a micro-batch, H W canvas pixels, N boxes of one image, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's RGB pixels in 0..1; what padded pixels hold before a model's own normalisation."""


class UserError(Exception):
    """Something the user can put right. Jobs print it as one line and exit with status 2."""


class TrainingError(Exception):
    """A run that cannot go on, and would fail again in the same way. Jobs print it as one line and exit with 1."""


def unwrapped(error: UserError | TrainingError) -> UserError | TrainingError:
    """What a task or worker raised: Ray's wrapping is of the same kind, and adds a traceback to the message."""
    kind = UserError if isinstance(error, UserError) else TrainingError
    return kind(str(getattr(error, "cause", error)))


class Stopped(Exception):  # noqa: N818  not an error
    """A run was asked to stop, and did after a checkpoint. Jobs print it and exit with 128 + the signal."""

    def __init__(self, message: str = "", signal_number: int = 0) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Preempted(Exception):  # noqa: N818  not an error
    """A node of the run is about to be taken away, and a checkpoint is kept: the run goes on elsewhere."""


@dataclass(frozen=True)
class ImageLimits:
    """The largest image file that is read. Memory for one image is a few times `bytes + 3 * pixels`."""

    pixels: int = 1 << 26
    bytes: int = 1 << 27


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class ClassList:
    """The classes of a dataset. `label` is the contiguous index 0..C-1, `category_id` is COCO's id.

    Labels follow ascending `category_id`, so two files with the same categories agree.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def distinct_names(self) -> tuple[str, ...]:
        """`names`, with ids where several classes have one name: for what is kept or shown by name."""
        counts = Counter(self.names)
        full = tuple(f"{name} (id {i})" for name, i in zip(self.names, self.category_ids, strict=True))
        told_apart = tuple(long if counts[name] > 1 else name for name, long in zip(self.names, full, strict=True))
        return told_apart if len(set(told_apart)) == len(told_apart) else full

    def to_json(self) -> list[dict[str, int | str]]:
        """COCO's own `categories` list."""
        return [{"id": i, "name": n} for i, n in zip(self.category_ids, self.names, strict=True)]

    @classmethod
    def from_json(cls, categories: list[dict]) -> ClassList:
        """From COCO's `categories`, in any order.

        Raises:
            UserError: two categories share an id.
        """
        ordered = sorted(categories, key=lambda c: c["id"])
        ids = tuple(int(c["id"]) for c in ordered)
        if len(set(ids)) != len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise UserError(f"category id {twice} appears more than once")
        return cls(tuple(str(c["name"]) for c in ordered), ids)


@dataclass(frozen=True)
class MicroBatch:
    """One ready micro-batch on the host: what a loader hands to a train or evaluation step.

    Every image lies top-left on a canvas of H x W; `sizes` says how much of it is real.
    """

    epoch: int
    step: int  # optimizer step within the epoch; in evaluation the batch number
    index: int  # micro-batch within the step
    pixels_BHW3: np.ndarray  # uint8 RGB
    sizes_B2: np.ndarray  # int32 (h, w) of the real pixels on the canvas
    orig_sizes_B2: np.ndarray  # int32 (h, w) of the stored image
    image_ids_B: np.ndarray  # int64
    boxes_N4: list[np.ndarray]  # B arrays, float32 xyxy in canvas pixels
    labels_N: list[np.ndarray]  # B arrays, int64 contiguous labels
    skipped_B: tuple[str, ...] = ()  # why an image is blank in place of its picture, "" where it is not; empty: none is
    skipped_partners: tuple[tuple[int, str], ...] = ()  # (image id, why) of those missing from pictures of other images

    @classmethod
    def joined(cls, parts: Sequence[MicroBatch]) -> MicroBatch:
        """One batch of the images of several, which have one canvas and in which no image is skipped."""
        return replace(
            parts[0],
            pixels_BHW3=np.concatenate([part.pixels_BHW3 for part in parts]),
            sizes_B2=np.concatenate([part.sizes_B2 for part in parts]),
            orig_sizes_B2=np.concatenate([part.orig_sizes_B2 for part in parts]),
            image_ids_B=np.concatenate([part.image_ids_B for part in parts]),
            boxes_N4=[boxes for part in parts for boxes in part.boxes_N4],
            labels_N=[labels for part in parts for labels in part.labels_N],
        )


@dataclass(frozen=True)
class Detections:
    """Detections of one image, best score first."""

    image_id: int
    boxes_N4: np.ndarray  # float32 xyxy in pixels of the stored image
    scores_N: np.ndarray  # float32 in 0..1
    labels_N: np.ndarray  # int64 contiguous labels
