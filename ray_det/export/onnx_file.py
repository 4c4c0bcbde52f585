"""A graph to an ONNX file, by torch's exporter."""

from __future__ import annotations

import builtins
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.export import Dim

from ray_det.export.graphs import DenseGraph, Graph, TransformersGraph
from ray_det.export.suppression import onnx_operators
from ray_det.export.two_stage import TwoStageGraph
from ray_det.models.detector import Detector
from ray_det.models.torchvision_adapter import DenseDetector, TwoStageDetector
from ray_det.models.transformers_adapter import TransformersDetector
from ray_det.types import UserError

OPSET = 18
INPUTS, OUTPUTS = ("images", "sizes"), ("boxes", "scores", "labels")
LARGEST_BATCH, LARGEST_SIDE = 1024, 8192


def graph_of(detector: Detector) -> Graph[Any]:
    """Raises UserError: a detector of no known kind."""
    if isinstance(detector, DenseDetector):
        return DenseGraph(detector).eval()
    if isinstance(detector, TwoStageDetector):
        return TwoStageGraph(detector).eval()
    if isinstance(detector, TransformersDetector):
        return TransformersGraph(detector).eval()
    raise UserError(f"{type(detector).__name__} cannot be exported to ONNX")


def write_onnx(
    graph: Graph[Any], path: Path, canvas: tuple[int, int], *, dynamic: bool, about: Mapping[str, str]
) -> None:
    """Write the graph, for any number of images.

    Args:
        canvas: (h, w) in pixels, the only one unless `dynamic`.
        dynamic: any canvas whose sides are multiples of the detector's `size_divisor`.
        about: the file's metadata.

    Raises:
        UserError: the packages of ray-det[onnx] are missing, or torch's exporter cannot take the model.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  what torch's exporter needs
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'ray-det[onnx]'") from None
    batch, divisor = Dim("batch", min=1, max=LARGEST_BATCH), graph.detector.size_divisor
    sides = {i: divisor * Dim(n, min=1, max=LARGEST_SIDE // divisor) for i, n in ((2, "rows"), (3, "columns"))}
    shapes = {"images": {0: batch} | (sides if dynamic else {}), "sizes": {0: batch}}
    images, sizes = torch.zeros(2, 3, *canvas, dtype=torch.uint8), torch.tensor([canvas, canvas])
    try:
        with torch.no_grad(), _without_int_of_shapes(graph.detector), _quiet():
            exported = torch.export.export(graph, (images, sizes), dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(
                exported,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                opset_version=OPSET,
                custom_translation_table=onnx_operators(),
                verbose=False,
            )
    except Exception as error:  # torch's exporters raise whatever the model makes them meet
        net = type(graph.detector.get_submodule("net")).__name__
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = "for any canvas: give --canvas HEIGHT,WIDTH" if dynamic else f"for {canvas[0]} x {canvas[1]} pixels"
        raise UserError(f"torch.onnx cannot export {net} {what} ({type(error).__name__}: {line})") from error
    assert program is not None
    model = program.model_proto
    _name_sides(model.graph)
    onnx.helper.set_model_props(model, dict(about))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def _name_sides(graph: Any) -> None:
    """The exporter calls what may vary s12 and 32*s7."""
    images = next(one for one in graph.input if one.name == INPUTS[0]).type.tensor_type.shape.dim
    names = dict(zip((images[i].dim_param for i in (0, 2, 3)), ("batch", "height", "width"), strict=True))
    for value in (*graph.input, *graph.output, *graph.value_info):
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param and side.dim_param in names:  # a fixed side has no name
                side.dim_param = names[side.dim_param]


@contextmanager
def _without_int_of_shapes(detector: Detector) -> Iterator[None]:
    """transformers takes `int` and `len` of what depends on the canvas or the batch, which would fix both."""

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, Tensor) else builtins.len(value)

    names = {kind.__module__ for module in detector.modules() for kind in type(module).__mro__}
    with ExitStack() as stack:
        for module in (sys.modules[name] for name in names if name.startswith("transformers.models.")):
            stack.enter_context(patch.object(module, "len", length, create=True))
            if hasattr(module, "torch_int"):
                stack.enter_context(patch.object(module, "torch_int", lambda value: value))
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks, of steps and of operators that it drops."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
