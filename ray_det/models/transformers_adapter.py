"""Detection transformers of Hugging Face `transformers` on a batch that is already resized, padded and normalised.

Their boxes are shares of the canvas, so that postprocessing needs the canvas and not the size of the image. The
network runs in the caller's autocast; box heads, score heads, matcher and criterion always run in float32.

Shape legend: B images, H W canvas pixels, N boxes of one image, Q queries, C classes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.profiler import record_function
from torchvision.ops import box_convert
from transformers import PreTrainedConfig, PreTrainedModel

from ray_det.models.criterion import without_syncs
from ray_det.models.detector import Batch, Detector, Prediction
from ray_det.models.precision import as_float, in_full_precision, keep_attention_in_float32, keep_in_float32
from ray_det.types import IMAGENET_MEAN, UserError

MIXES_QUERIES = Version(transformers.__version__) < Version("5.18")
"""Whether the last layer's loss would be matched to denoising queries too (huggingface/transformers#48528)."""
DETECTIONS_PER_IMAGE = 100
"""As many as COCO's evaluation looks at."""
EXACT_HEADS = re.compile(r"(^|\.)(\w*bbox\w*|integral|class_embed|class_labels_classifier)(\.\d+)?$")
"""Modules that give coordinates or scores: bfloat16 would round a box to 1/256 of the canvas."""
WEIGHTED = {
    "vfl": "weight_loss_vfl",
    "mal": "weight_loss_mal",
    "bbox": "weight_loss_bbox",
    "giou": "weight_loss_giou",
    "fgl": "weight_loss_fgl",
    "ddf": "weight_loss_ddf",
}
"""Losses of the RT-DETR line, which come weighted, and the configuration's field that tells whether they exist.

DEIM's matchability-aware loss (mal) replaces the varifocal loss (vfl), whose field stays.
"""


class TransformersDetector(Detector):
    """A `...ForObjectDetection`.

    Args:
        network: with its configuration and labels set.
        architecture, mean, std, pad: see `Detector`.
    """

    net: PreTrainedModel

    def __init__(
        self,
        network: PreTrainedModel,
        architecture: dict[str, Any],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pad: tuple[float, ...] = IMAGENET_MEAN,
    ) -> None:
        super().__init__(mean, std, pad)
        self.net = network
        self.architecture = architecture
        self.size_divisor = size_divisor(network.config)
        self.coefficients = loss_coefficients(network.config)
        self.loss_names = tuple(self.coefficients)
        network.loss_function = ExactCriterion(without_syncs(network.loss_function))
        for name, module in list(network.named_modules()):
            if EXACT_HEADS.search(name) and not isinstance(module, nn.ModuleList):
                cast(nn.Module, module).__class__ = in_full_precision(type(module))
        keep_in_float32(network)
        keep_attention_in_float32()
        self._takes_mask = "pixel_mask" in inspect.signature(network.forward).parameters
        self._unreached: dict[bool, tuple[str, ...]] = {}

    @property
    def backbone(self) -> nn.Module | None:
        return next((m for m in self.net.modules() if is_backbone(m)), None)

    @property
    def networks(self) -> list[nn.Module]:
        parts = self.net.base_model.named_children()
        return [module for name, module in parts if name in ("backbone", "encoder", "decoder")]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        batch = self._with_cells(batch)
        return self.losses(batch, self.outputs(batch, self.labels(batch)))

    def predict(self, batch: Batch) -> list[Prediction]:
        batch = self._with_cells(batch)
        outputs = self.outputs(batch, None)
        return self.postprocess(batch, outputs.logits, outputs.pred_boxes)

    def loss_and_predict(self, batch: Batch) -> tuple[dict[str, Tensor], list[Prediction]]:
        batch = self._with_cells(batch)
        outputs = self.outputs(batch, self.labels(batch))
        return self.losses(batch, outputs), self.postprocess(batch, outputs.logits, outputs.pred_boxes)

    def _with_cells(self, batch: Batch) -> Batch:
        """On a larger canvas where this one has fewer cells than queries are picked from, as of very narrow images."""
        strides = getattr(self.net.config, "feat_strides", ())
        height, width = old = batch.images_B3HW.shape[-2:]
        while strides and sum((height // s) * (width // s) for s in strides) < self.net.config.num_queries:
            if height < width:
                height += self.size_divisor
            else:
                width += self.size_divisor
        if (height, width) == old:
            return batch
        more = (0, width - old[1], 0, height - old[0])
        images_B3HW, mask_BHW = (F.pad(one, more) for one in (batch.images_B3HW, batch.pixel_mask_BHW))
        return replace(batch, images_B3HW=images_B3HW, pixel_mask_BHW=mask_BHW)

    def outputs(self, batch: Batch, labels: list[dict[str, Tensor]] | None) -> Any:
        """The library's output object.

        Raises:
            UserError: the canvas has fewer cells than the model picks queries from.
        """
        images = self.normalise(batch)
        mask = {"pixel_mask": batch.pixel_mask_BHW.long()} if self._takes_mask else {}
        try:
            return self.net(pixel_values=images, labels=labels, **mask)
        except RuntimeError as error:
            if "selected index k out of range" not in str(error):
                raise
            height, width = images.shape[-2:]
            queries = self.net.config.num_queries
            raise UserError(
                f"a canvas of {height} x {width} pixels has too few cells for {queries} queries: "
                "larger images, or fewer num_queries in model.config"
            ) from None

    def labels(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Labels, and boxes (N, 4) as centre x, centre y, width, height in shares of the canvas."""
        height, width = batch.images_B3HW.shape[-2:]
        scale = torch.tensor([width, height] * 2).to(batch.images_B3HW.device, non_blocking=True)
        return [
            {"class_labels": t["labels"], "boxes": box_convert(t["boxes"], "xyxy", "cxcywh") / scale}
            for t in batch.targets
        ]

    def losses(self, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        """The total, and its weighted components summed over decoder layers, encoder and denoising queries."""
        parts = {name: outputs.loss.new_zeros(()) for name in self.loss_names}
        for key, value in outputs.loss_dict.items():  # "loss_bbox", "loss_bbox_aux_2", "loss_bbox_dn_0", ...
            name = "_".join(key.split("_")[:2])
            if name in parts:
                parts[name] = parts[name] + self.coefficients[name] * value.detach()
        return {"loss": self._whole_graph(batch, outputs.loss.float()), **parts}

    def postprocess(self, batch: Batch, logits_BQC: Tensor, boxes_BQ4: Tensor) -> list[Prediction]:
        """The best `DETECTIONS_PER_IMAGE`, in canvas pixels, clipped to the real pixels.

        Args:
            logits_BQC: (B, Q, C) of independent classes, or (B, Q, C + 1) where the last one is "no object".
            boxes_BQ4: centre x, centre y, width, height in shares of the canvas.
        """
        height, width = batch.images_B3HW.shape[-2:]
        classes = cast(int, self.net.config.num_labels)
        if logits_BQC.shape[-1] > classes:  # softmax: one class per query
            scores_BQ, labels_BQ = logits_BQC.float().softmax(-1)[..., :classes].max(-1)
            scores_BK, query_BK = scores_BQ.topk(min(DETECTIONS_PER_IMAGE, scores_BQ.shape[1]))
            labels_BK = labels_BQ.gather(1, query_BK)
        else:
            scores_BQC = logits_BQC.float().sigmoid().flatten(1)
            scores_BK, index_BK = scores_BQC.topk(min(DETECTIONS_PER_IMAGE, scores_BQC.shape[1]))
            query_BK, labels_BK = index_BK // classes, index_BK % classes
        xyxy_BQ4 = box_convert(boxes_BQ4.float(), "cxcywh", "xyxy")
        boxes_BK4 = xyxy_BQ4.gather(1, query_BK[..., None].expand(-1, -1, 4))
        canvas, real_B14 = (
            torch.tensor(size).to(boxes_BK4.device, non_blocking=True)
            for size in ([width, height] * 2, [[[w, h] * 2] for h, w in batch.sizes])
        )
        boxes_BK4 = (boxes_BK4 * canvas).clamp(min=0).minimum(real_B14)
        found = zip(boxes_BK4, scores_BK, labels_BK, strict=True)
        return [Prediction(boxes=boxes, scores=scores, labels=labels) for boxes, scores, labels in found]

    def _whole_graph(self, batch: Batch, loss: Tensor) -> Tensor:
        """The loss with all trainable parameters in its graph: what it does not depend on enters times zero.

        Which parameters those are depends on whether the micro-batch has a box (no box, no denoising queries), and is
        looked up once for each case.
        """
        if not loss.requires_grad:
            return loss
        boxes = any(len(t["labels"]) for t in batch.targets)
        if boxes not in self._unreached:
            reached = parameters_in_graph(loss)
            self._unreached[boxes] = tuple(
                name for name, p in self.named_parameters() if p.requires_grad and id(p) not in reached
            )
        for name in self._unreached[boxes]:
            loss = loss + 0.0 * self.get_parameter(name).sum()
        return loss


def is_backbone(module: nn.Module) -> bool:
    """By the name of the library's mixin, whose place changes between versions."""
    return any(kind.__name__ == "BackboneMixin" for kind in type(module).__mro__)


class ExactCriterion:
    """A library's criterion in float32, normalised by the boxes of this micro-batch alone."""

    def __init__(self, criterion: Callable[..., Any]) -> None:
        self.criterion = criterion
        self.mixes_queries = MIXES_QUERIES and criterion.__name__.startswith(("RTDetrFor", "DFineFor"))

    @record_function("criterion")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if self.mixes_queries and (noise := kwargs.get("denoising_meta_values")):
            own = noise["dn_num_split"][1]
            args = tuple(a[:, -own:] if i in (0, 3) else a for i, a in enumerate(args))  # logits, pred_boxes
        with torch.autocast(device, enabled=False), one_process():
            return self.criterion(*(as_float(a) for a in args), **{k: as_float(v) for k, v in kwargs.items()})


@contextmanager
def one_process() -> Iterator[None]:
    """Hide an initialised `accelerate` from the criterion, which would average the number of boxes over the ranks."""
    try:
        from accelerate import PartialState  # pyright: ignore[reportMissingImports]
    except ImportError:
        yield
        return
    shared = PartialState._shared_state
    PartialState._shared_state = {}
    try:
        yield
    finally:
        PartialState._shared_state = shared


def parameters_in_graph(loss: Tensor) -> set[int]:
    """`id` of every parameter that a backward pass from `loss` reaches."""
    found: set[int] = set()
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(cast(Any, node).variable))
        todo += [following for following, _ in node.next_functions]
    return found


def loss_coefficients(config: PreTrainedConfig) -> dict[str, float]:
    """Base name of every loss of this model -> weight that the library multiplies it with only in the total."""
    if hasattr(config, "weight_loss_bbox"):
        names = [name for name, field in WEIGHTED.items() if hasattr(config, field)]
        return {f"loss_{name}": 1.0 for name in names if (name, "mal" in names) != ("vfl", True)}
    return {
        "loss_ce": float(getattr(config, "class_loss_coefficient", 1)),
        "loss_bbox": float(cast(Any, config).bbox_loss_coefficient),
        "loss_giou": float(cast(Any, config).giou_loss_coefficient),
    }


def size_divisor(config: PreTrainedConfig) -> int:
    """32, or a whole number of attention windows for plain vision transformers (RF-DETR: 14 x 4 = 56)."""
    backbone = getattr(config, "backbone_config", None)
    patch = getattr(backbone, "patch_size", None)
    windows = getattr(backbone, "num_windows_side", None) or getattr(backbone, "num_windows", 1)
    return patch * windows if isinstance(patch, int) else 32
