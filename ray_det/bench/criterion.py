"""Criteria and matchers: what they cost against the libraries' own, and how often a step waits for its device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.loss.loss_utils import LOSS_MAPPING

from ray_det.bench.alone import seconds
from ray_det.bench.measure import Arm, Figure, compare, single
from ray_det.bench.syncs import host_syncs
from ray_det.bench.task import DFINE_SMALL
from ray_det.config import ModelConfig, OptimConfig
from ray_det.models.build import build_detector
from ray_det.models.detector import Batch
from ray_det.models.torchvision_adapter import DenseOutputs, targets, total
from ray_det.models.transformers_adapter import ExactCriterion
from ray_det.train.optim import build_optimizer
from ray_det.train.step import train_step
from ray_det.types import ClassList, MicroBatch

IMAGES, SIDE, BOXES = 4, 640, (3, 7, 0, 18)  # COCO's images have 7 boxes on average
CLASSES = ClassList(tuple(f"class {i}" for i in range(80)), tuple(range(1, 81)))
LOSSES = {
    "d_fine": "DFineForObjectDetection",
    "rt_detr_v2": "RTDetrV2ForObjectDetection",
    "detr": "ForObjectDetection",
}
DENSE = ("fcos", "retinanet")
MODELS = {
    "d_fine": ModelConfig(name="transformers/d_fine", weights="none", config=DFINE_SMALL),
    "rt_detr_v2": ModelConfig(name="transformers/rt_detr_v2", weights="none"),
    "detr": ModelConfig(name="transformers/detr", weights="none"),
    "fcos": ModelConfig(name="torchvision/fcos_resnet50_fpn", weights="none"),
    "retinanet": ModelConfig(name="torchvision/retinanet_resnet50_fpn", weights="none"),
}


def figures(repeats: int) -> Iterator[Figure]:
    """Time of forward and backward through the criterion, its share of the step, host syncs of a step."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    arms = {name: _Step("d_fine", device, ours=name == "ours") for name in ("ours", "transformers")}
    settings = {"model": "D-FINE-S", "images": IMAGES, "side": SIDE, "boxes": BOXES, "classes": len(CLASSES)}
    yield _criterion_figure(arms, settings, device, repeats)
    ours, peer = (Arm(n, s.share, settings) for n, s in arms.items())
    title = "criterion and matcher in a training step"
    more = {"transformers": single(title, "share", peer, repeats=repeats).values}
    yield single(title, "share", ours, repeats=repeats, target="<= 0.1", more=more)
    for family in DENSE:
        arms = {name: _DenseStep(family, device, ours=name == "ours") for name in ("ours", "torchvision")}
        yield _criterion_figure(arms, settings | {"model": MODELS[family].name}, device, repeats)
    for family in MODELS:
        yield _sync_figure(family)


def _criterion_figure(
    arms: dict[str, _Step] | dict[str, _DenseStep], settings: dict[str, Any], device: torch.device, repeats: int
) -> Figure:
    ours, peer = (Arm(n, lambda s=s: 1000 * seconds(s.criterion, device), settings) for n, s in arms.items())
    title = f"criterion and matcher of {settings['model']}, forward and backward"
    return compare(title, "ms", ours, peer, repeats=repeats)


def _sync_figure(family: str) -> Figure:
    kind, library = (_DenseStep, "torchvision") if family in DENSE else (_Step, "transformers")
    places = {
        ours: host_syncs(lambda device, ours=ours: kind(family, device, ours=ours, side=192)) for ours in (True, False)
    }
    own = {ours: Counter({k: n for k, n in found.items() if not in_model(k)}) for ours, found in places.items()}
    return compare(
        f"host syncs of a training step, without those of the library's network: {family}",
        "syncs",
        Arm("ours", lambda: own[True].total()),
        Arm(library, lambda: own[False].total()),
        repeats=1,
        target="<= 2",
        more={"in the network": (places[True] - own[True]).total(), "places": dict(places[True])},
    )


def in_model(place: str) -> bool:
    """Whether a place of `host_syncs` belongs to the library's network: its code, its checks, its masks."""
    file = place.rpartition(":")[0]
    return "modeling_" in file or file.endswith(("utils/import_utils.py", "transformers/masking_utils.py"))


class _Step:
    """A training step on one micro-batch, and the criterion alone on what the network said in it."""

    def __init__(self, family: str, device: torch.device, *, ours: bool, side: int = SIDE) -> None:
        torch.manual_seed(0)
        self.detector: Any = build_detector(MODELS[family], CLASSES)[0].to(device).train()
        if not ours:
            self._take_theirs(family)
        self.optimizer = build_optimizer(OptimConfig(), self.detector)
        self.device, self.micro = device, drawn(side)
        self._listen()

    def __call__(self) -> None:
        train_step(
            self.detector, self.optimizer, [self.micro], device=self.device, clip_norm=0.1, seed=0, global_step=0
        )

    def criterion(self) -> None:
        """Forward and backward, to the network's answers."""
        if not self.said:
            self()
        args, kwargs = tree_map_only(Tensor, _leaf, self.said[0])
        loss = self.detector.net.loss_function(*args, **kwargs)[0]
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.autograd.grad(loss, leaves, allow_unused=True)

    def share(self) -> float:
        step = seconds(self, self.device)
        return seconds(self.criterion, self.device) / step

    def _take_theirs(self, family: str) -> None:
        self.detector.net.loss_function = ExactCriterion(LOSS_MAPPING[LOSSES[family]])

    def _listen(self) -> None:
        """Keeps what the loss function is called with the first time."""
        self.said: list[Any] = []
        criterion = self.detector.net.loss_function.criterion

        def heard(*args: Any, **kwargs: Any) -> Any:
            if not self.said:
                like = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (args, kwargs))
                self.said.append(like)
            return criterion(*args, **kwargs)

        heard.__name__ = criterion.__name__
        self.detector.net.loss_function.criterion = heard


class _DenseStep(_Step):
    """The same of FCOS or RetinaNet."""

    def criterion(self) -> None:
        if not self.said:
            self()
        batch, outputs = self.said[0]
        maps = tree_map_only(Tensor, _leaf, outputs.maps)
        torch.autograd.grad(self.detector.criterion(batch, replace(outputs, maps=maps))["loss"], list(maps.values()))

    def _take_theirs(self, family: str) -> None:
        net = self.detector.net

        def criterion(batch: Batch, outputs: DenseOutputs) -> dict[str, Tensor]:
            levels = [outputs.per_level] if family == "fcos" else []
            return total(net.compute_loss(targets(batch), outputs.maps, outputs.anchors, *levels))

        self.detector.criterion = criterion

    def _listen(self) -> None:
        self.said = []
        criterion = self.detector.criterion

        def heard(batch: Batch, outputs: DenseOutputs) -> dict[str, Tensor]:
            if not self.said:
                maps = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), outputs.maps)
                self.said.append((batch, replace(outputs, maps=maps)))
            return criterion(batch, outputs)

        self.detector.criterion = heard


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def drawn(side: int, images: int = IMAGES) -> MicroBatch:
    """Square noise with boxes, always the same."""
    rng = np.random.default_rng(0)
    counts = np.resize(BOXES, images)
    sizes = np.full((images, 2), side, np.int32)
    corners = [rng.uniform(0, 0.6 * side, (n, 2)) for n in counts]
    boxes = [np.hstack([c, c + rng.uniform(0.05 * side, 0.4 * side, c.shape)]).astype(np.float32) for c in corners]
    labels = [rng.integers(0, len(CLASSES), n) for n in counts]
    pixels = rng.integers(0, 256, (images, side, side, 3), np.uint8)
    return MicroBatch(0, 0, 0, pixels, sizes, sizes, np.arange(images), boxes, labels)
