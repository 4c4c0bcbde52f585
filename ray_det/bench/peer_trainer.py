"""D-FINE in a Hugging Face `Trainer`, tuned: `python -m … TASK`.

The library's own way: its image processor resizes and pads in the DataLoader's processes, its criterion, its loop.
What is better than its defaults: batches are padded to their own maximum in place of a fixed square, the processes
stay, each has four batches ahead, and AdamW is the fused one.
"""

from __future__ import annotations

import random
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import ImageOps
from torchvision.datasets import CocoDetection
from transformers import (
    CONFIG_MAPPING,
    AutoModelForObjectDetection,
    RTDetrImageProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.image_utils import get_image_size_for_max_height_width

from ray_det.bench.task import Stopwatch, Task, main, prepared
from ray_det.models.transformers_build import override, with_labels

SETTINGS = {
    "loop": "transformers.Trainer",
    "data": "torchvision.datasets.CocoDetection (Pillow), RTDetrImageProcessor in collate_fn",
    "batches": "random, padded to their own maximum, a multiple of 32",
    "dataloader": "persistent processes, 4 batches ahead, pinned memory on a GPU",
    "optimizer": "adamw_torch_fused, clipped at 1.0, cosine",
    "logging_steps": 50,
}
AHEAD = 4
DIVISOR = 32


def network(task: Task) -> torch.nn.Module:
    """From the configuration that ray_det's arm gives to `--model.config`."""
    base = CONFIG_MAPPING[task.model.name.removeprefix("transformers/")]()
    config = with_labels(override(base, task.model.config, "model.config"), task.class_list)
    return AutoModelForObjectDetection.from_config(config)


def train(task: Task) -> None:
    device, bf16 = prepared(task)
    size = {"max_height": task.image_size, "max_width": task.image_size}
    processor = RTDetrImageProcessor(size=size, do_pad=True)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=task.steps,
            per_device_train_batch_size=task.batch_size,
            learning_rate=task.lr,
            weight_decay=task.weight_decay,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            bf16=bf16,
            use_cpu=device.type == "cpu",
            dataloader_num_workers=task.loaders,
            dataloader_persistent_workers=True,
            dataloader_prefetch_factor=AHEAD,
            dataloader_pin_memory=device.type == "cuda",
            dataloader_drop_last=True,
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=SETTINGS["logging_steps"],
            report_to="none",
            disable_tqdm=True,
            seed=task.seed,
        )
        Trainer(
            model=network(task),
            args=arguments,
            train_dataset=CocoDetection(task.root, task.data, transforms=partial(flipped, probability=task.flip)),
            data_collator=partial(collate, processor=processor, image_size=task.image_size),
            callbacks=[_Timed(Stopwatch(task, device))],
        ).train()


class _Timed(TrainerCallback):
    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._watch.step()


def flipped(image: Any, annotations: list[dict[str, Any]], *, probability: float) -> tuple[Any, list[dict[str, Any]]]:
    """An image and its COCO annotations, mirrored or not."""
    if random.random() >= probability:
        return image, annotations
    mirrored = [a | {"bbox": [image.width - a["bbox"][0] - a["bbox"][2], *a["bbox"][1:]]} for a in annotations]
    return ImageOps.mirror(image), mirrored


def collate(samples: list[tuple[Any, list[dict[str, Any]]]], *, processor: Any, image_size: int) -> dict[str, Any]:
    """What the model takes, on a canvas as large as the batch's largest image."""
    images = [image for image, _ in samples]
    fits = [get_image_size_for_max_height_width((i.height, i.width), image_size, image_size) for i in images]
    height, width = (-(-max(sides) // DIVISOR) * DIVISOR for sides in zip(*fits, strict=True))
    annotations = [{"image_id": i, "annotations": boxes} for i, (_, boxes) in enumerate(samples)]
    pad = {"height": height, "width": width}
    return dict(processor(images=images, annotations=annotations, pad_size=pad, return_tensors="pt"))


if __name__ == "__main__":
    main(train)
