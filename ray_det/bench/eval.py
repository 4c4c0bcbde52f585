"""COCO scoring: from every image's detections to the numbers, against pycocotools; and joining the ranks' detections.

What is asserted on the way: all numbers are equal to the last bit, however many ranks the detections come from.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pydantic import Field

from ray_det import boxes as box_ops
from ray_det.bench.measure import Arm, Bench, Figure, compare
from ray_det.data import coco
from ray_det.data.headers import Header
from ray_det.data.manifest import Manifest, build
from ray_det.data.preflight import KINDS, inspect
from ray_det.evaluate.coco_eval import NAMES, coco_metrics
from ray_det.evaluate.results import Results
from ray_det.types import ClassList, Detections, UserError

Count = Annotated[int, Field(ge=1)]
CROWDS, NEAR = 0.01, 0.5
"""Shares: of objects that are crowds (val2017: 1.2 %), of detections that are near an object."""


class Config(Bench):
    data: str | None = Field(default=None, description="COCO JSON in place of drawn objects; its images are not read")
    images: Count = Field(default=5000, description="images that are drawn")
    objects: Annotated[float, Field(gt=0)] = Field(default=7.3, description="mean number of objects of a drawn image")
    classes: Count = Field(default=80, description="classes of drawn objects")
    detections: Count = Field(default=100, description="detections of each image")
    ranks: tuple[Count, ...] = Field(default=(1, 8), description="numbers of ranks that the detections come from")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="seed of what is drawn")


def run(config: Config) -> Iterator[Figure]:
    draws = np.random.default_rng(config.seed)
    content = _read(config.data) if config.data else json.dumps(_document(config, draws)).encode()
    manifest = _manifest(content, config.data or "drawn objects")
    document = json.loads(content)
    for annotation in document["annotations"]:  # pycocotools has no defaults
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    detections = _detections(document, manifest.classes, config.detections, draws)
    yield _scoring(config, document, manifest, detections)
    wanted = coco_metrics(manifest, Results.of(detections))
    for ranks in config.ranks:
        yield _joining(config, manifest, [detections[rank::ranks] for rank in range(ranks)], wanted)


def _scoring(config: Config, document: Any, manifest: Manifest, detections: list[Detections]) -> Figure:
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        truth.dataset = document
        truth.createIndex()
    numbers: dict[str, list[float]] = {}
    seen: dict[str, Any] = {
        "images": len(detections),
        "detections": len(detections) * config.detections,
        "objects": len(document["annotations"]),
    }

    def ours() -> None:
        metrics = coco_metrics(manifest, Results.of(detections))
        numbers["ours"] = list(metrics.values())
        seen.update({name: metrics[name] for name in NAMES[:3]})

    def peer() -> None:
        numbers["peer"] = _by_pycocotools(truth, detections, manifest.classes)

    def rate(score: Callable[[], None]) -> float:
        seconds = _seconds(score)
        if len(numbers) == 2 and numbers["ours"] != numbers["peer"]:
            raise AssertionError(f"the numbers differ: {numbers}")
        return len(detections) / seconds

    return compare(
        "COCO scoring",
        "images/s",
        Arm("hotcoco", lambda: rate(ours), {"hotcoco": version("hotcoco"), "threads": "all cores"}),
        Arm(
            "pycocotools",
            lambda: rate(peer),
            {"pycocotools": version("pycocotools"), "threads": 1, "ground truth": "read and indexed before"},
        ),
        repeats=config.repeats,
        target=">= 10x",
        more=seen,
    )


def _joining(config: Config, manifest: Manifest, shards: list[list[Detections]], wanted: dict[str, float]) -> Figure:
    """Seconds of the slowest rank's packing and rank 0's unpacking; what is between them is the network's."""
    sent: dict[str, int] = {}

    def ours() -> float:
        packing, parts = _slowest(shards, lambda shard: pickle.dumps(Results.of(shard)))
        sent["bytes"] = sum(map(len, parts))
        joined: list[Results] = []
        unpacking = _seconds(lambda: joined.append(Results.joined([pickle.loads(part) for part in parts])))
        if coco_metrics(manifest, joined[0]) != wanted:
            raise AssertionError(f"{len(shards)} ranks give other numbers than one list")
        return packing + unpacking

    def peer() -> float:
        packing, parts = _slowest(shards, pickle.dumps)
        sent["bytes_as_objects"] = sum(map(len, parts))
        return packing + _seconds(lambda: Results.of([d for part in parts for d in pickle.loads(part)]))

    return compare(
        f"joining the detections of {len(shards)} rank{'s' if len(shards) > 1 else ''}",
        "s",
        Arm("columns", ours),
        Arm("objects", peer, {"what": "each image's arrays pickled, made columns by rank 0"}),
        repeats=config.repeats,
        more=sent,
    )


def _slowest(shards: list[list[Detections]], pack: Callable[[list[Detections]], bytes]) -> tuple[float, list[bytes]]:
    parts: list[bytes] = []
    return max(_seconds(lambda shard=shard: parts.append(pack(shard))) for shard in shards), parts


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _by_pycocotools(truth: Any, detections: list[Detections], classes: ClassList) -> list[float]:
    """The twelve numbers and AP per class, as its users get them."""
    results = [
        {"image_id": found.image_id, "category_id": classes.category_ids[label], "bbox": box, "score": score}
        for found in detections
        for box, score, label in zip(
            box_ops.xyxy_to_xywh(found.boxes_N4).tolist(), found.scores_N.tolist(), found.labels_N.tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation: Any = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = (evaluation.eval["precision"][:, :, k, 0, -1] for k in range(len(classes)))
    found = (precision[precision > -1] for precision in per_class)
    return evaluation.stats.tolist() + [float(np.mean(values)) if values.size else -1.0 for values in found]


def _document(config: Config, draws: np.random.Generator) -> dict[str, Any]:
    """Objects as COCO's are: many small ones, areas of a polygon below the box's, few crowds, rare classes."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 480, "width": 640} for i in range(1, config.images + 1)]
    image_of_M = np.repeat(np.arange(1, config.images + 1), draws.poisson(config.objects, config.images))
    count = len(image_of_M)
    sides = np.exp(draws.normal(4, 1, (count, 2))).clip(4, (640, 480)).round(2)
    corners = (draws.random((count, 2)) * ((640, 480) - sides)).round(2)
    category_of_M = 1 + (config.classes * draws.random(count) ** 2).astype(int)
    crowd_M, covered_M = (draws.random(count) < CROWDS).astype(int), draws.uniform(0.3, 0.9, count)
    columns = zip(image_of_M.tolist(), category_of_M.tolist(), corners.tolist(), sides.tolist(), strict=True)
    annotations = [
        {"id": i + 1, "image_id": image, "category_id": category, "bbox": corner + side}
        | {"area": side[0] * side[1] * covered_M[i].item(), "iscrowd": crowd_M[i].item()}
        for i, (image, category, corner, side) in enumerate(columns)
    ]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, config.classes + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}") from None


def _manifest(content: bytes, source: str) -> Manifest:
    """As if all files were there, in the size that is declared.

    Raises:
        UserError: not COCO, or what the scoring here cannot do without: sizes, ids that are listed, once each.
    """
    data = coco.parse(content, source)
    sizes = dict(zip(data.file_names, data.declared_I2.tolist(), strict=True))
    if unknown := [name for name, size in sizes.items() if min(size) < 1]:
        raise UserError(f"{source}: {unknown[0]} has no height and width")

    def map_chunks(_: Any, chunks: list) -> list[list[Header]]:
        return [[Header("ok", *sizes[name]) for name in names] for _, names in chunks]

    checked, report = inspect(data, "/", map_chunks)
    for kind in ("duplicate_image_id", "duplicate_annotation_id", "unknown_image_id", "unknown_category_id"):
        for finding in report.findings.get(kind, ()):
            raise UserError(f"{source}: {KINDS[kind][1].partition(';')[0]}: {finding}")
    return build(checked, "/")


def _detections(document: Any, classes: ClassList, count: int, draws: np.random.Generator) -> list[Detections]:
    """`count` of each image, best score first: near its objects, and anywhere."""
    own: dict[int, list[dict]] = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        own[annotation["image_id"]].append(annotation)
    label_of = {category_id: label for label, category_id in enumerate(classes.category_ids)}
    found = []
    for image in document["images"]:
        limits = np.array([image["width"], image["height"]] * 2)
        objects = own[image["id"]]
        picked = draws.integers(0, len(objects), int(count * NEAR)) if objects else []
        near = box_ops.xywh_to_xyxy(np.array([objects[i]["bbox"] for i in picked], np.float64).reshape(-1, 4))
        near += draws.normal(0, 0.1, near.shape) * np.tile(near[:, 2:] - near[:, :2], 2)
        ends = draws.random((count - len(near), 2, 2))
        boxes = np.concatenate([near, np.concatenate([ends.min(axis=1), ends.max(axis=1)], axis=1) * limits])
        labels = draws.integers(len(classes), size=count)
        right = draws.random(len(near)) < 0.8
        labels[: len(near)][right] = [label_of[objects[i]["category_id"]] for i in np.asarray(picked)[right]]
        scores = (draws.random(count) * np.where(np.arange(count) < len(near), 1, 0.5)).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        boxes = box_ops.clip(boxes, image["height"], image["width"]).astype(np.float32)
        found.append(Detections(image["id"], boxes[order], scores[order], labels[order]))
    return found
