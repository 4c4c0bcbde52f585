"""The whole configuration of a run: frozen, typed, every field with its unit.

Wrong values fail here, by name and value.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ray_det.config_data import CLASSES, RENAME, SOURCES, AugmentConfig, ClassName, DatasetConfig, MaxBytes, MaxPixels
from ray_det.section import NonNegative, PositiveInt, Section

__all__ = [
    "CLASSES",
    "RENAME",
    "SCORER",
    "SOURCES",
    "AugmentConfig",
    "ClassName",
    "DatasetConfig",
    "EvalConfig",
    "MaxBytes",
    "MaxPixels",
    "ModelConfig",
    "OptimConfig",
    "Scorer",
    "Section",
    "TrainConfig",
    "TrainJobConfig",
    "WandbConfig",
    "WorkersConfig",
    "changed_keys",
    "micro_batches",
]

Scorer = Literal["hotcoco", "pycocotools"]
SCORER = "what computes the COCO numbers, which are the same to the bit; hotcoco is many times faster"


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
    freeze: tuple[str, ...] = Field(
        default=(), description="modules whose weights and norms stay: backbone, or names such as backbone.body.conv1"
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
    backbone_lr_factor: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="what the learning rate is multiplied by for the backbone, x"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="decay per step of a moving average of the weights, which is evaluated in their place; 0: none",
    )
    ema_warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=2000, description="the decay of step n is multiplied by 1 - exp(-n / this); 0: no warm-up"
    )


class TrainConfig(Section):
    epochs: PositiveInt = Field(default=24, description="passes over the training data")
    patience: Annotated[int, Field(ge=0)] = Field(
        default=0, description="epochs without a better val/AP after which the run goes on to its test; 0: never"
    )
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
    async_checkpoints: bool = Field(
        default=True, description="go on training while a copy of weights and optimizer is written"
    )
    compile: bool = Field(
        default=False, description="torch.compile the network, for GPUs: minutes at the start; costs exact resume"
    )
    sync_batch_norm: bool = Field(
        default=False, description="batch norms take their statistics over all workers; on GPUs only"
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
    profile_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="steps of the first epoch that rank 0 traces to profile/ in the run folder; 0: none"
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
    background: bool = Field(
        default=False,
        description="validate on a CPU or GPU of its own while the next epoch trains; its numbers come an epoch later",
    )


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

    @property
    def validators(self) -> int:
        """Processes beside the train workers, each as large as one."""
        return int(self.eval.background and self.data.val is not None)

    @model_validator(mode="after")
    def _divisible(self) -> TrainJobConfig:
        micro_batches(self.train, self.workers.most)
        return self

    @model_validator(mode="after")
    def _not_closed_at_once(self) -> TrainJobConfig:
        augment, epochs = self.augment, self.train.epochs
        if (augment.partners or augment.iou_crop) and augment.close_mosaic >= epochs:
            raise ValueError(f"augment.close_mosaic {augment.close_mosaic} leaves none of train.epochs {epochs}")
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
