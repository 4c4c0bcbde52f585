"""FCOS and Faster R-CNN in a loop like torchvision's references/detection, tuned: `python -m … TASK`.

As there: CocoDetection and its tensors in a DataLoader with batches grouped by aspect ratio, resize, normalisation
and padding by the model's own `GeneralizedRCNNTransform`, one look at the loss's value per step. What is better than
its defaults: the processes stay, each has four batches ahead, and AdamW is the fused one.
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torchvision.datasets import CocoDetection
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2 import functional

from ray_det.bench.task import Stopwatch, Task, main, prepared
from ray_det.models.torchvision_adapter import IMAGENET_STD
from ray_det.models.torchvision_build import library_network
from ray_det.types import IMAGENET_MEAN

SETTINGS = {
    "loop": "as torchvision's references/detection",
    "data": "torchvision.datasets.CocoDetection (Pillow), GeneralizedRCNNTransform in the model",
    "batches": "random within groups of aspect ratios (aspect_ratio_group_factor 3), padded to their own maximum",
    "dataloader": "persistent processes, 4 batches ahead, pinned memory on a GPU",
    "optimizer": "AdamW, fused",
}
AHEAD = 4
GROUP_FACTOR = 3


def network(task: Task) -> nn.Module:
    """The same modules as in ray_det's arm, with torchvision's forward and its transform."""
    name = task.model.name.removeprefix("torchvision/")
    net = library_network(name, task.model.fpn_channels, task.model.config, task.classes)
    size = task.image_size
    net.transform = GeneralizedRCNNTransform(size, size, list(IMAGENET_MEAN), list(IMAGENET_STD))
    return net


def train(task: Task) -> None:
    device, bf16 = prepared(task)
    net = network(task).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), task.lr, weight_decay=task.weight_decay, fused=True)
    watch = Stopwatch(task, device)
    for images, targets in batches(task, isinstance(net, FasterRCNN), pin=device.type == "cuda"):
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in targets]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = torch.stack(list(net(images, targets).values())).sum()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.step()


def batches(task: Task, background: bool, *, pin: bool) -> DataLoader:
    """Of images (3, H, W) float32 in 0..1 and targets."""
    transforms = partial(to_tensors, probability=task.flip, first_label=int(background))
    images = json.loads(Path(task.data).read_text())["images"]
    aspects = {record["id"]: record["width"] / record["height"] for record in images}
    dataset = CocoDetection(task.root, task.data, transforms=transforms)
    return DataLoader(
        dataset,
        batch_sampler=GroupedBatches([aspects[i] for i in dataset.ids], task),
        num_workers=task.loaders,
        persistent_workers=True,
        prefetch_factor=AHEAD,
        pin_memory=pin,
        collate_fn=collate,
    )


def to_tensors(
    image: Any, annotations: list[dict[str, Any]], *, probability: float, first_label: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """An image and its COCO annotations as torchvision's models take them, mirrored or not."""
    boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([a["category_id"] + first_label for a in annotations], dtype=torch.int64)
    pixels = functional.pil_to_tensor(image)
    if random.random() < probability:
        pixels = functional.horizontal_flip(pixels)
        boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
    return functional.to_dtype(pixels, torch.float32, scale=True), {"boxes": boxes, "labels": labels}


def collate(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class GroupedBatches(Sampler[list[int]]):
    """Random batches of images whose aspect ratios lie in one group, as many as the task has steps.

    Images that do not fill a group's last batch are kept for the next pass.
    """

    def __init__(self, aspects: list[float], task: Task) -> None:
        edges = 2 ** np.linspace(-1, 1, 2 * GROUP_FACTOR + 1)
        self._groups, self._task = np.digitize(aspects, edges), task

    def __len__(self) -> int:
        return self._task.steps

    def __iter__(self) -> Iterator[list[int]]:
        rng, waiting, given = random.Random(self._task.seed), defaultdict[int, list[int]](list), 0
        while given < len(self):
            for i in rng.sample(range(len(self._groups)), len(self._groups)):
                batch = waiting[self._groups[i]]
                batch.append(i)
                if len(batch) == self._task.batch_size and given < len(self):
                    given += 1
                    yield waiting.pop(self._groups[i])


if __name__ == "__main__":
    main(train)
