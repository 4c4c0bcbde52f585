"""What the arms of `jobs/bench.py train` have in common: the same photographs, model, precision and number of steps.

Each arm runs in a process of its own, so that neither memory nor threads of one are left to the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ray_det.config import ModelConfig, Section
from ray_det.data.manifest import Manifest
from ray_det.types import ClassList, UserError

if TYPE_CHECKING:
    import torch

DFINE_SMALL: dict[str, Any] = {
    "auxiliary_loss": True,
    "freeze_backbone_batch_norms": False,  # with random weights they must learn
    "backbone_config": {
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 64, 256, 512],
        "stage_mid_channels": [16, 32, 64, 128],
        "stage_out_channels": [64, 256, 512, 1024],
        "hidden_sizes": [128, 256, 512, 1024],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [3, 3, 3, 3],
        "embedding_size": 32,
        "use_learnable_affine_block": True,
    },
    "encoder_in_channels": [256, 512, 1024],
    "hidden_expansion": 0.5,
    "depth_mult": 0.34,
    "decoder_layers": 3,
    "decoder_n_points": [3, 6, 3],
}
"""D-FINE-S (arXiv:2410.13842): what differs from the library's defaults, which are the extra large one's."""
MODELS = {
    "dfine": ModelConfig(name="transformers/d_fine", weights="none", config=DFINE_SMALL),
    "fcos": ModelConfig(name="torchvision/fcos_mobilenet_v2_fpn", weights="none", fpn_channels=128),
    "fcos_resnet50": ModelConfig(name="torchvision/fcos_resnet50_fpn", weights="none"),
    "fasterrcnn": ModelConfig(name="torchvision/fasterrcnn_mobilenet_v2_fpn", weights="none", fpn_channels=128),
}
MARK = "images/s: "


class Task(Section):
    """What every arm is to do. Augmentation is a flip of every second image, on average, in all of them."""

    data: str  # COCO JSON with category ids 0..C-1
    root: str  # of its file names
    classes: int
    model: ModelConfig
    image_size: int  # longest side, pixels
    batch_size: int
    steps: int
    skipped: int  # first steps, which are not counted
    precision: Literal["fp32", "bf16"]
    threads: int  # of torch, in the process that trains
    loaders: int  # processes that load
    lr: float = 1e-4
    weight_decay: float = 1e-4
    flip: float = 0.5
    seed: int = 0

    @property
    def class_list(self) -> ClassList:
        return ClassList(tuple(f"class {i}" for i in range(self.classes)), tuple(range(self.classes)))

    def settings(self) -> dict[str, Any]:
        return self.model_dump(exclude={"data", "root", "model"}) | {"model": self.model.name}


def subset(manifest: Manifest, images: int, folder: Path, seed: int = 0) -> Path:
    """A COCO JSON of as many images that can be trained on, with contiguous category ids, as all arms read it.

    Raises:
        UserError: there are not as many.
    """
    rows = np.flatnonzero(manifest.table["trainable"].to_numpy())
    if len(rows) < images:
        raise UserError(f"{manifest.source}: {len(rows)} images can be trained on, {images} are needed: fewer --steps")
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:images])
    key = hashlib.sha256(f"{manifest.hash} {images} {seed}".encode()).hexdigest()[:12]
    path = folder / f"{key}.json"
    if path.exists():
        return path
    records, annotations = [], []
    for row in manifest.table.take(rows).to_pylist():
        records.append({"id": row["image_id"], "file_name": row["uri"], **{k: row[k] for k in ("height", "width")}})
        for box, label, area, ok in zip(row["boxes"], row["labels"], row["area"], row["box_ok"], strict=True):
            if ok:
                one = {"id": len(annotations) + 1, "image_id": row["image_id"], "category_id": label, "iscrowd": 0}
                annotations.append(one | {"bbox": box, "area": area})
    categories = [{"id": i, "name": name} for i, name in enumerate(manifest.classes.names)]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": records, "annotations": annotations, "categories": categories}))
    return path


def run_peer(module: str, task: Task) -> float:
    """Train in another process -> the images/s that it tells."""
    return _told(run_process([sys.executable, "-m", module, task.model_dump_json()]))


def run_process(command: list[str]) -> str:
    """What a command prints; its end is an error if it is one, with the last lines.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command[:4])} failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        )
    return done.stdout


def environment() -> dict[str, str]:
    """Of the arms: a cluster that the shell knows is not theirs, and nothing is looked up in the network."""
    given = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")}
    return given | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


def _told(output: str) -> float:
    return float(next(line for line in output.splitlines() if line.startswith(MARK)).removeprefix(MARK))


class Stopwatch:
    """Times a peer's steps but the first ones, with two synchronisations of the device in all."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task, self._device, self._done, self._start = task, device, 0, 0.0

    def step(self) -> None:
        """After every optimizer step; after the last one it says the rate."""
        self._done += 1
        if self._done == self._task.skipped:
            self._start = self._now()
        if self._done == self._task.steps:
            images = (self._task.steps - self._task.skipped) * self._task.batch_size
            print(f"{MARK}{images / (self._now() - self._start)}", flush=True)

    def _now(self) -> float:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def prepared(task: Task) -> tuple[torch.device, bool]:
    """(device, whether to autocast to bfloat16) of a peer's process, with its threads and seed set."""
    import torch

    torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, task.precision == "bf16"


def main(train: Callable[[Task], None]) -> None:
    """Of a peer's process."""
    train(Task.model_validate_json(sys.argv[1]))
