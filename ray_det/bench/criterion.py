"""Criterion and matcher of a detection transformer: what they cost, and how often a step waits for its device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
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
from ray_det.models.detector import Detector
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
SYNC_STEPS: dict[str, dict[str, Any]] = {"d_fine": DFINE_SMALL, "rt_detr_v2": {}, "detr": {}}


def figures(repeats: int) -> Iterator[Figure]:
    """Time of forward and backward through the criterion, its share of the step, host syncs of a step."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    arms = {name: _Step("d_fine", DFINE_SMALL, device, ours=name == "ours") for name in ("ours", "transformers")}
    settings = {"model": "D-FINE-S", "images": IMAGES, "side": SIDE, "boxes": BOXES, "classes": len(CLASSES)}
    ours, peer = (Arm(n, lambda s=s: 1000 * seconds(s.criterion, device), settings) for n, s in arms.items())
    yield compare("criterion and matcher, forward and backward", "ms", ours, peer, repeats=repeats)
    ours, peer = (Arm(n, s.share, settings) for n, s in arms.items())
    title = "criterion and matcher in a training step"
    more = {"transformers": single(title, "share", peer, repeats=repeats).values}
    yield single(title, "share", ours, repeats=repeats, target="<= 0.1", more=more)
    for family, config in SYNC_STEPS.items():
        yield _sync_figure(family, config)


def _sync_figure(family: str, config: dict[str, Any]) -> Figure:
    places = {
        ours: host_syncs(lambda device, ours=ours: _Step(family, config, device, ours=ours, side=192))
        for ours in (True, False)
    }
    own = {ours: Counter({k: n for k, n in found.items() if not in_model(k)}) for ours, found in places.items()}
    return compare(
        f"host syncs of a training step, without those of the library's network: {family}",
        "syncs",
        Arm("ours", lambda: own[True].total()),
        Arm("transformers", lambda: own[False].total()),
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

    def __init__(
        self, family: str, config: dict[str, Any], device: torch.device, *, ours: bool, side: int = SIDE
    ) -> None:
        torch.manual_seed(0)
        name = f"transformers/{family}"
        self.detector = build_detector(ModelConfig(name=name, weights="none", config=config), CLASSES)[0]
        self.detector.to(device).train()
        net: Any = self.detector.net
        if not ours:
            net.loss_function = ExactCriterion(LOSS_MAPPING[LOSSES[family]])
        self.optimizer = build_optimizer(OptimConfig(), self.detector)
        self.device, self.micro = device, drawn(side)
        self.said = _listen(self.detector)

    def __call__(self) -> None:
        train_step(
            self.detector, self.optimizer, [self.micro], device=self.device, clip_norm=0.1, seed=0, global_step=0
        )

    def criterion(self) -> None:
        """Forward and backward, to the network's answers."""
        if not self.said:
            self()
        net: Any = self.detector.net
        args, kwargs = tree_map_only(Tensor, _leaf, self.said[0])
        loss = net.loss_function(*args, **kwargs)[0]
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.autograd.grad(loss, leaves, allow_unused=True)

    def share(self) -> float:
        step = seconds(self, self.device)
        return seconds(self.criterion, self.device) / step


def _listen(detector: Detector) -> list[Any]:
    """Keeps what the loss function is called with the first time."""
    said: list[Any] = []
    net: Any = detector.net
    criterion = net.loss_function.criterion

    def heard(*args: Any, **kwargs: Any) -> Any:
        if not said:
            said.append(tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (args, kwargs)))
        return criterion(*args, **kwargs)

    heard.__name__ = criterion.__name__
    net.loss_function.criterion = heard
    return said


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
