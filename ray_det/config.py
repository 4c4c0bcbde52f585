"""The whole configuration of a run: frozen, typed, every field with its unit.

Wrong values fail here, by name and value.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ray_det.types import DEFAULT_LIMITS, ImageLimits

Share = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
ClassName = Annotated[str, Field(min_length=1)]

SOURCES = "COCO JSON, VOC folder or list (.txt), YOLO data.yaml"
CLASSES = "names of the classes to use, after `rename`; empty: all. Images without boxes of these stay"
RENAME = 'new names of classes, {"old": "new"}; those that get one name become one class'
Scorer = Literal["hotcoco", "pycocotools"]
SCORER = "what computes the COCO numbers, which are the same to the bit; hotcoco is many times faster"
MaxPixels = Annotated[
    int, Field(ge=1, le=178_956_970, description="pixels of the largest image that is decoded; larger are unreadable")
]
"""Above Pillow's own guard there is no reading of anything but JPEG."""
MaxBytes = Annotated[int, Field(ge=1, description="bytes of the largest image file that is read")]


_SECRET = re.compile(r"token|api_?key|password|passwd|secret|credential", re.IGNORECASE)
_PASSWORD_IN_URI = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@]*:[^/?#@]*@", re.IGNORECASE)
_INSTEAD = "would be written to config.yaml, logs and checkpoints; give it in the environment"


class Section(BaseModel):
    """A frozen group of fields; an unknown key and a secret are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _without_secrets(cls, value: Any) -> Any:
        if (found := _secret(value)) is not None:
            raise ValueError(f"{found} {_INSTEAD}")
        return value


def _secret(value: Any, key: str = "") -> str | None:
    """The secret in a field's value, in words. Numbers under such keys are none: `pad_token_id`, `num_tokens`."""
    if isinstance(value, str):
        if value and _SECRET.search(key):
            return f"the text of '{key}'"
        return "the password in a URI" if _PASSWORD_IN_URI.match(value) else None
    if isinstance(value, dict):
        found = [_secret(inner, str(name)) for name, inner in value.items()]
    else:
        found = [_secret(inner, key) for inner in value] if isinstance(value, (list, tuple)) else []
    return next(filter(None, found), None)


class DatasetConfig(Section):
    train: str | None = Field(default=None, description=f"data to train on: {SOURCES} or manifest")
    val: str | None = Field(default=None, description="data evaluated after every epoch, as for train")
    test: str | None = Field(default=None, description="data evaluated once, with the best checkpoint, as for train")
    images: str | None = Field(
        default=None, description="root of every `file_name` (folder or URI); default: found beside each source"
    )
    classes: tuple[str, ...] = Field(default=(), description=CLASSES)
    rename: dict[str, ClassName] = Field(default={}, description=RENAME)
    image_size: Annotated[int, Field(ge=32, le=4096)] = Field(
        default=640, description="side that images are resized to, pixels"
    )
    resize: Literal["longest", "shortest", "square"] = Field(
        default="longest", description="which side becomes image_size; square gives up the aspect ratio"
    )
    multi_scale: tuple[PositiveInt, ...] = Field(
        default=(), description="image sizes (pixels) of which each training step draws one; empty: always image_size"
    )
    padding: Literal["mean", "zero"] = Field(
        default="mean", description="what padded pixels hold: ImageNet's mean, or black"
    )
    window: PositiveInt = Field(
        default=16,
        description="global batches per window of the plan, inside which images are sorted by aspect ratio; 1: random",
    )
    last_batch: Literal["wrap", "drop"] = Field(
        default="wrap",
        description="an epoch's last, short global batch: filled with images from its start, or left out",
    )
    max_pixels: MaxPixels = DEFAULT_LIMITS.pixels
    max_bytes: MaxBytes = DEFAULT_LIMITS.bytes
    on_bad_image: Literal["fail", "skip"] = Field(
        default="fail",
        description="what an image does that the preflight passed and that cannot be decoded when it is loaded: end "
        "the run, or be replaced by a blank one without boxes",
    )
    max_skipped_share: Share = Field(
        default=0.01, description="share of images replaced so, of an epoch's or of all so far, above which runs end"
    )
    strict: bool = Field(
        default=False, description="refuse data in which the preflight finds any error, or an image is in two splits"
    )

    @property
    def limits(self) -> ImageLimits:
        return ImageLimits(self.max_pixels, self.max_bytes)


class AugmentConfig(Section):
    flip: Share = Field(default=0.5, description="probability of a horizontal flip")
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        default=(0.9, 1.3), description="range of the scale jitter, x; above 1 crops, below 1 pads, the canvas stays"
    )
    min_visible: Share = Field(
        default=0.25, description="share of a box's area that a crop must leave for the box to stay"
    )
    brightness: Share = Field(default=0.2, description="largest change of brightness, share")
    contrast: Share = Field(default=0.2, description="largest change of contrast, share")
    saturation: Share = Field(default=0.2, description="largest change of saturation, share")

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: {self.scale[0]} > {self.scale[1]}")
        return self


class ModelConfig(Section):
    name: str = Field(
        default="transformers/ustc-community/dfine-small-coco",
        description="torchvision/<builder | detector_backbone_fpn> or transformers/<hub id | folder | model type>",
    )
    weights: str = Field(default="default", description="default, none, or a file (whole detector or backbone only)")
    fpn_channels: Annotated[int, Field(ge=8)] = Field(
        default=256, description="channels of the pyramid of torchvision/<detector>_<backbone>_fpn"
    )
    config: dict[str, Any] = Field(
        default={},
        description="JSON: fields of the transformers configuration, or arguments of the torchvision detector",
    )


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0)] = Field(default=5e-5, description="learning rate at the start")
    lr_min: NonNegative = Field(default=1e-6, description="learning rate at the end of the cosine")
    weight_decay: NonNegative = Field(default=1e-4, description="AdamW's decoupled weight decay")
    decay_norms_and_biases: bool = Field(default=True, description="apply the weight decay to norms and biases too")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="how the learning rate falls")
    interval: Literal["epoch", "step"] = Field(default="epoch", description="when the schedule moves")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="linear warm-up, optimizer steps")
    clip_norm: NonNegative = Field(default=1.0, description="largest global gradient norm; 0: no clipping")


class TrainConfig(Section):
    epochs: PositiveInt = Field(default=24, description="passes over the training data")
    global_batch_size: PositiveInt = Field(default=16, description="images per optimizer step, over all workers")
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="images per forward pass; default: global batch / workers"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="auto: bf16 autocast on CUDA and AMX CPUs, fp32 elsewhere; the criterion is always fp32",
    )
    checkpoint_every_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="steps between checkpoints within an epoch; 0: at the end of epochs only"
    )
    max_nonfinite_steps: PositiveInt = Field(
        default=5, description="steps in a row with a non-finite loss or gradient before the run fails"
    )
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(
        default=0, description="times that it goes back to its last checkpoint instead, with a lower learning rate"
    )
    rollback_lr_factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="what the learning rate is multiplied by each time"
    )
    deterministic: bool | None = Field(default=None, description="deterministic algorithms; default: on CPU")


class EvalConfig(Section):
    batch_size: PositiveInt | None = Field(
        default=None, description="images per forward pass; default: the micro-batch size"
    )
    every_epochs: PositiveInt = Field(
        default=1, description="epochs between evaluations on val; the last is always evaluated"
    )
    pictures: Annotated[int, Field(ge=0)] = Field(default=4, description="val images drawn with their boxes each epoch")
    scorer: Scorer = Field(default="hotcoco", description=SCORER)


class WorkersConfig(Section):
    num: PositiveInt | Annotated[str, Field(pattern=r"^[1-9]\d*\.\.[1-9]\d*$")] = Field(
        default=1,
        description="train workers (one GPU each where GPUs are used); 2..8: as many as the cluster has room for",
    )
    threads: PositiveInt | None = Field(
        default=None, description="torch threads per worker; default: the node's cores / workers"
    )
    use_gpu: bool | None = Field(default=None, description="default: whether the cluster has GPUs enough")
    cpus: Annotated[float, Field(gt=0)] = Field(default=1, description="CPUs reserved per worker; loaders use the rest")
    start_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=60, description="seconds to wait for a cluster with room for all workers"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(default=3, description="worker failures to recover from")
    max_preemption_failures: Annotated[int, Field(ge=0)] = Field(
        default=100, description="nodes taken away by the cluster to recover from"
    )
    resize_interval_s: Annotated[float, Field(gt=0)] = Field(
        default=60, description="seconds between looks whether a range of workers has room for more"
    )
    stall_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=600, description="seconds without progress after which a worker is reported and restarted"
    )
    storage_timeout_s: NonNegative = Field(
        default=120, description="seconds that a storage or data set may be out of reach, or a disk full"
    )

    @property
    def least(self) -> int:
        """Workers that a run needs."""
        return self.num if isinstance(self.num, int) else int(self.num.split("..")[0])

    @property
    def most(self) -> int:
        """Workers that a run takes where there is room; a global batch is laid out for them."""
        return self.num if isinstance(self.num, int) else int(self.num.split("..")[1])

    @model_validator(mode="after")
    def _ordered(self) -> WorkersConfig:
        if self.least > self.most:
            raise ValueError(f"workers.num {self.num}: {self.least} > {self.most}")
        return self


class WandbConfig(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", description="auto: online with an API key, offline without"
    )
    project: str = Field(default="ray_det", description="wandb project")
    entity: str | None = Field(default=None, description="wandb team or user")
    group: str | None = Field(default=None, description="wandb group")


class TrainJobConfig(Section):
    """Everything `jobs/train.py` can be told."""

    name: str = Field(
        default="default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="run name; the same name goes on"
    )
    storage: str = Field(default="./runs", description="folder or URI that holds run folders")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="seed of the plan, the augmentation and the model")
    overwrite: bool = Field(default=False, description="delete what a run of this name left and start anew")
    allow_changes: bool = Field(default=False, description="resume although the configuration or the data changed")
    data: DatasetConfig = DatasetConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    workers: WorkersConfig = WorkersConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _divisible(self) -> TrainJobConfig:
        micro_batches(self.train, self.workers.most)
        return self


def micro_batches(train: TrainConfig, workers: int) -> tuple[int, int]:
    """(M, B): micro-batches per global batch and images per micro-batch.

    Raises:
        ValueError: the global batch does not divide into equal micro-batches, or those not among the workers.
    """
    total = train.global_batch_size
    if train.micro_batch_size is None and total % workers:
        raise ValueError(f"train.global_batch_size {total} is not divisible by workers.num {workers}")
    size = train.micro_batch_size or total // workers
    if total % size:
        raise ValueError(f"train.global_batch_size {total} is not divisible by train.micro_batch_size {size}")
    if (total // size) % workers:
        raise ValueError(
            f"a global batch of {total} in micro-batches of {size} gives {total // size}, "
            f"not divisible by workers.num {workers}"
        )
    return total // size, size


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose JSON values differ, each as "key: old -> new"."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and (a or b):
            lines += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines
