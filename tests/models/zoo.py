"""A small detector of every family, and pictures to show them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_det.config import ModelConfig
from ray_det.models.build import build_detector
from ray_det.models.detector import Batch, Detector, to_device
from ray_det.types import ClassList, MicroBatch

CLASSES = ClassList(("red", "green", "blue"), (1, 5, 9))
CANVAS = (96, 128)
SIZES = ((96, 128), (80, 128), (96, 100), (64, 64), (90, 110), (96, 70), (72, 96), (50, 128))
COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 230]], np.uint8)
CPU = torch.device("cpu")

RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
HGNET = {
    "stem_channels": [3, 8, 16],
    "stage_in_channels": [16, 32, 48, 64],
    "stage_mid_channels": [8, 16, 16, 24],
    "stage_out_channels": [32, 48, 64, 96],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "hidden_sizes": [32, 48, 64, 96],
}
RT_DETR = {
    "encoder_hidden_dim": 64,
    "encoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "d_model": 64,
    "decoder_in_channels": [64, 64, 64],
    "decoder_ffn_dim": 128,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_queries": 30,
    "num_denoising": 20,
    "hidden_expansion": 0.5,
}
DETR = {
    "backbone_config": RESNET,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 20,
    "dropout": 0.0,
}
BACKBONE = "shufflenet_v2_x0_5"
FAMILIES: dict[str, ModelConfig] = {
    "fcos": ModelConfig(name=f"torchvision/fcos_{BACKBONE}_fpn", weights="none", fpn_channels=64),
    "retinanet": ModelConfig(
        name=f"torchvision/retinanet_{BACKBONE}_fpn",
        weights="none",
        fpn_channels=64,
        config={
            "anchor_sizes": [[12, 17], [24, 34], [48, 68], [96, 136], [192, 272]],
            "aspect_ratios": [0.5, 1.0, 2.0],
        },
    ),
    "fasterrcnn": ModelConfig(
        name=f"torchvision/fasterrcnn_{BACKBONE}_fpn",
        weights="none",
        fpn_channels=32,
        config={
            "anchor_sizes": [8, 16, 32, 64, 128],
            "rpn_post_nms_top_n_train": 100,
            "rpn_post_nms_top_n_test": 100,
            "box_batch_size_per_image": 32,
        },
    ),
    "d_fine": ModelConfig(
        name="transformers/d_fine",
        weights="none",
        config=RT_DETR | {"backbone_config": HGNET, "encoder_in_channels": [48, 64, 96], "depth_mult": 0.34},
    ),
    "rt_detr_v2": ModelConfig(
        name="transformers/rt_detr_v2",
        weights="none",
        config=RT_DETR
        | {
            "backbone_config": {k: v for k, v in RESNET.items() if k != "model_type"},
            "encoder_in_channels": [32, 48, 64],
        },
    ),
    "detr": ModelConfig(name="transformers/detr", weights="none", config=DETR),
}
CNNS = ("fcos", "retinanet", "fasterrcnn")
DETRS = ("d_fine", "rt_detr_v2", "detr")


def build(family: str, seed: int = 0, **options: Any) -> Detector:
    """A small detector, freshly initialised from the seed."""
    torch.manual_seed(seed)
    return build_detector(FAMILIES[family], CLASSES, **options)[0]


def micro_batch(images: int = 3, seed: int = 0, boxes: bool = True) -> MicroBatch:
    """Pictures of mixed sizes on one canvas: 1 to 3 coloured rectangles on a grey, noisy ground."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((images, *CANVAS, 3), np.uint8)
    all_boxes, all_labels = [], []
    for image, (height, width) in enumerate(SIZES[:images]):
        pixels[image, :height, :width] = rng.integers(100, 140, (height, width, 3))
        labels = rng.integers(0, 3, rng.integers(1, 4) if boxes else 0)
        corners = [_rectangle(rng, height, width, k, len(labels)) for k in range(len(labels))]
        for (x0, y0, x1, y1), label in zip(corners, labels, strict=True):
            pixels[image, y0:y1, x0:x1] = COLOURS[label]
        all_boxes.append(np.array(corners, np.float32).reshape(-1, 4))
        all_labels.append(labels.astype(np.int64))
    sizes = np.array(SIZES[:images], np.int32)
    return MicroBatch(0, 0, 0, pixels, sizes, sizes, np.arange(images), all_boxes, all_labels)


def batch(images: int = 3, seed: int = 0, boxes: bool = True) -> Batch:
    return to_device(micro_batch(images, seed, boxes), CPU)


def spread_scores(detector: Detector) -> Detector:
    """Random weights say nearly the same everywhere: make the parameters larger, so that scores differ."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if any(part in name for part in ("cls_logits", "cls_score", "class_embed", "class_labels_classifier")):
                parameter += 0.5 * torch.randn_like(parameter)
                if name.endswith("bias"):
                    parameter.clamp_(min=-1.0)  # RetinaNet's prior of 0.01 is below its threshold
            elif any(part in name for part in ("bbox_reg", "bbox_pred", "bbox_embed", "bbox_predictor")):
                parameter += 0.02 * torch.randn_like(parameter)
    return detector.eval()


def gradients(detector: torch.nn.Module) -> Tensor:
    """All gradients in one vector; parameters without one are an error."""
    grads = {n: p.grad for n, p in detector.named_parameters() if p.requires_grad}
    absent = [n for n, g in grads.items() if g is None]
    assert not absent, absent
    return torch.cat([g.flatten() for g in grads.values() if g is not None])


def _rectangle(rng: np.random.Generator, height: int, width: int, k: int, of: int) -> tuple[int, int, int, int]:
    """Inside the k-th vertical strip of `of`, so that rectangles do not hide each other."""
    left, right = width * k // of, width * (k + 1) // of
    w, h = rng.integers(14, min(right - left, 48) + 1), rng.integers(14, 48)
    x, y = rng.integers(left, right - w + 1), rng.integers(0, height - h + 1)
    return int(x), int(y), int(x + w), int(y + h)
