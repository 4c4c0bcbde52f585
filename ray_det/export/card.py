"""The model card, README.md beside what was exported, in the hub's form: YAML, then text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ray_det.export.graphs import Graph
from ray_det.export.parity import MAX_BOX_PX, MAX_SCORE, SHOWN_SCORE, Parity
from ray_det.models.detector import Detector
from ray_det.models.transformers_adapter import TransformersDetector
from ray_det.train.checkpoint import Checkpoint

PARITY = "parity.json"
RESIZE = {
    "longest": "keeps its aspect, with the longest side at {0} pixels",
    "shortest": "keeps its aspect, with the shortest side at {0} pixels and the longest at most 5/3 of that",
    "square": "becomes {0} x {0} pixels",
}


def interface(checkpoint: Checkpoint, graph: Graph[Any], canvas: tuple[int, int] | None) -> dict[str, str]:
    """What goes into an ONNX file and what comes out, in words: its metadata, and a part of the card."""
    data, divisor = checkpoint.config.data, graph.detector.size_divisor
    sides = f"H = {canvas[0]}, W = {canvas[1]}" if canvas else f"H and W any multiples of {divisor}"
    return {
        "input images": f"uint8 (B, 3, H, W), RGB, {sides}: images at the top left; normalisation is inside, and what "
        "lies beyond an image's size does not matter",
        "input sizes": "int64 (B, 2), height and width in pixels of each image on its canvas",
        "preparation": "an image as it is stored (EXIF orientation not applied) "
        + RESIZE[data.resize].format(data.image_size)
        + ("" if canvas else f"; its canvas is the next multiple of {divisor}"),
        "output boxes": f"float32 (B, {graph.places}, 4), x0 y0 x1 y1 in canvas pixels, inside of the image, after the "
        "checkpoint's own post-processing; scale them by stored size / resized size",
        "output scores": f"float32 (B, {graph.places}), best first; 0 where there are fewer boxes",
        "output labels": f"int64 (B, {graph.places}), places in `classes`; -1 where there are fewer boxes",
        "classes": json.dumps(checkpoint.classes.to_json()),
    }


def model_card(
    checkpoint: Checkpoint,
    detector: Detector,
    about: Mapping[str, str],
    metrics: Mapping[str, Any],
    parity: Parity | None,
    command: str,
) -> str:
    """README.md.

    Args:
        about: `interface`, of an ONNX file.
        metrics: of the run, by name.
    """
    transformers = isinstance(detector, TransformersDetector)
    name = type(detector.get_submodule("net")).__name__
    lines = ["---", "pipeline_tag: object-detection", "tags:", "- object-detection", "- ray_det"]
    lines += ["library_name: transformers"] if transformers else []
    lines += ["---", "", f"# {name}, {len(checkpoint.classes)} classes", ""]
    lines += [f"Trained as `{checkpoint.config.model.name}`, {checkpoint.state.global_step} steps.", ""]
    lines += ["## Files", "", "* `model.onnx`: the whole detector, for onnxruntime and others"]
    what = "`AutoModelForObjectDetection.from_pretrained` loads it" if transformers else "torchvision's weights"
    lines += [f"* `pretrained/`: safetensors and configuration; {what}"]
    lines += [] if parity is None else [f"* `{PARITY}`: how ONNX and checkpoint compare, with the bounds"]
    lines += [
        "",
        "## The ONNX file",
        "",
        *_table(("what", "is"), [(k, v) for k, v in about.items() if k != "classes"]),
        "",
    ]
    lines += ["## Classes", ""]
    classes = checkpoint.classes
    numbered = zip(range(len(classes)), classes.category_ids, classes.names, strict=True)
    lines += [*_table(("label", "category_id", "name"), numbered), ""]
    shown = [(key, f"{value:.4f}") for key, value in metrics.items() if isinstance(value, float) and value >= 0]
    if shown:
        lines += ["## Metrics of the run", "", *_table(("metric", "value"), shown), ""]
    lines += ["## Parity of ONNX and checkpoint", "", *_parity_lines(parity), ""]
    lines += ["## Made of", "", *_table(("what", "is"), _origin(checkpoint, command)), ""]
    return "\n".join(lines)


def _origin(checkpoint: Checkpoint, command: str) -> list[tuple[str, str]]:
    hashes = checkpoint.content["data_hashes"]
    rows = [(f"hash of the {split} data", f"`{value}`") for split, value in hashes.items()]
    rows += [(f"SHA-256 of {name}", f"`{value}`") for name, value in checkpoint.content["sha256"].items()]
    return [*rows, ("run", f"`{checkpoint.content['run_id']}`"), ("command", f"`{command}`")]


def _parity_lines(parity: Parity | None) -> list[str]:
    if parity is None:
        return ["Not compared: no images were given."]
    lines = [
        f"On {parity.images} images, both in float32, {parity.agreeing} of {parity.detections} detections (both sides, "
        f"from a score of {SHOWN_SCORE} on) have a partner of their class within {MAX_BOX_PX} pixels and {MAX_SCORE:g} "
        f"of the score; the farthest partners are {parity.worst_box_px:.2g} pixels and {parity.worst_score:.2g} apart."
    ]
    if parity.ap_checkpoint is not None:
        lines += ["", f"AP of the checkpoint {parity.ap_checkpoint:.4f}, of the ONNX file {parity.ap_onnx:.4f}."]
    return lines


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]
