"""COCO documents of every kind that data sets are, and detections near their objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ray_det.types import Detections

Draws = np.random.Generator
Annotation = dict[str, Any]
Document = dict[str, Any]

SIDE = 200
"""Height and width of all images, pixels."""
NAN = float("nan")


def some(draws: Draws, things: list[Any]) -> list[Any]:
    """A fifth of them, at least one where there is one."""
    return [things[i] for i in draws.permutation(len(things))[: -(-len(things) // 5)]]


def crowds(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    for annotation in some(draws, annotations):
        annotation["iscrowd"] = 1


def other_areas(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    limits = [0, 32**2, 96**2, 1e10, np.nextafter(32**2, 0), np.nextafter(96**2, 1e9), -1, NAN, float("inf")]
    for annotation in some(draws, annotations):
        annotation["area"] = float(draws.choice([*limits, draws.uniform(0, 2e4)]))


def boxes_at_area_limits(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    for annotation in some(draws, annotations):
        annotation["bbox"][2:] = [side := float(draws.choice([32, 96])), side]
        annotation["area"] = side**2
    for found in detections:
        found.boxes_N4[::3, 2:] = found.boxes_N4[::3, :2] + np.float32(draws.choice([32, 96]))


def shared_ids(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    for annotation in some(draws, annotations):
        annotation["id"] = draws.choice([a["id"] for a in annotations]).item()


def id_zero(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    for annotation in some(draws, annotations)[:1]:
        annotation["id"] = 0


def negative_ids(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    for annotation in annotations:
        annotation["id"] = -annotation["id"]


def equal_scores(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    for found in detections:
        found.scores_N[:] = found.scores_N.round(1)


def more_than_a_hundred(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    for i, found in enumerate(detections):
        rows = draws.integers(0, len(found.scores_N), 300)
        boxes = found.boxes_N4[rows] + draws.normal(0, 3, (300, 4)).astype(np.float32)
        scores = np.sort(draws.random(300).astype(np.float32))[::-1].copy()
        detections[i] = Detections(found.image_id, boxes, scores, np.repeat(found.labels_N[rows[:1]], 300))


def empty_boxes(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    for annotation in some(draws, annotations):
        annotation["bbox"][draws.integers(2, 4)] = float(draws.choice([0, -7]))
    for found in some(draws, detections):
        found.boxes_N4[::2, 2] = found.boxes_N4[::2, 0] - np.float32(draws.choice([0, 5]))


def boxes_that_are_no_numbers(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    for annotation in some(draws, annotations)[:2]:
        annotation["bbox"][draws.integers(4)] = float(draws.choice([NAN, float("inf")]))


def detections_that_are_no_numbers(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    for found in some(draws, detections):
        row = draws.integers(0, len(found.scores_N), 2)[: len(found.scores_N)]
        found.boxes_N4[row[:1], draws.integers(4)] = draws.choice([NAN, np.inf])
        found.scores_N[row[1:]] = draws.choice([NAN, np.inf])


def no_detections(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    detections[:] = [Detections(d.image_id, d.boxes_N4[:0], d.scores_N[:0], d.labels_N[:0]) for d in detections]


def nothing_annotated(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    annotations.clear()


def one_class_without_objects(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    annotations[:] = [a for a in annotations if a["category_id"] != 40]


def images_left_out(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    del detections[::2]


def far_and_huge(draws: Draws, annotations: list[Annotation], detections: list[Detections]) -> None:
    for found in some(draws, detections):
        found.boxes_N4[::2] *= np.float32(1e30)


KINDS: dict[str, Callable[[Draws, list[Annotation], list[Detections]], None]] = {
    kind.__name__: kind
    for kind in (
        crowds,
        other_areas,
        boxes_at_area_limits,
        shared_ids,
        id_zero,
        negative_ids,
        equal_scores,
        more_than_a_hundred,
        empty_boxes,
        boxes_that_are_no_numbers,
        detections_that_are_no_numbers,
        nothing_annotated,
        one_class_without_objects,
        images_left_out,
        far_and_huge,
        no_detections,  # what changes them comes before
    )
}
"""What data can be like; each changes a document's annotations and the detections."""


def drawn(seed: int, kinds: list[str]) -> tuple[Document, list[Detections]]:
    """A COCO document and detections near its objects, with ids that are far apart and in no order."""
    draws = np.random.default_rng(seed)
    image_ids = [int(i) for i in (2**60, 3, -900, 8, 4, 77)][: draws.integers(2, 7)]
    category_ids = [40, 1, -2, 2**55]
    annotations = [
        {
            "id": int(i),
            "image_id": int(draws.choice(image_ids[:-1])),  # the last one has no objects
            "category_id": int(draws.choice(category_ids)),
            "bbox": [float(v) for v in (*draws.uniform(0, 120, 2).round(2), *draws.uniform(1, 80, 2).round(2))],
            "iscrowd": 0,
        }
        for i in draws.permutation(np.arange(1, draws.integers(2, 60)))
    ]
    for annotation in annotations:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    labels = {category_id: label for label, category_id in enumerate(sorted(category_ids))}
    detections = [near(draws, i, [a for a in annotations if a["image_id"] == i], labels) for i in image_ids]
    for kind in filter(kinds.__contains__, KINDS):
        KINDS[kind](draws, annotations, detections)
    images = [{"id": i, "file_name": f"{i}.jpg", "height": SIDE, "width": SIDE} for i in image_ids]
    categories = [{"id": i, "name": f"c{i}"} for i in category_ids]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def near(draws: Draws, image_id: int, own: list[Annotation], labels: dict[int, int]) -> Detections:
    true = [own[i] for i in draws.integers(0, len(own), 2 * len(own))] if own else []
    boxes = np.array([a["bbox"] for a in true], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = np.concatenate([boxes + draws.normal(0, draws.choice([0, 4]), boxes.shape), draws.uniform(0, 200, (3, 4))])
    named = np.array([labels[a["category_id"]] for a in true] + draws.integers(0, len(labels), 3).tolist(), np.int64)
    scores = np.sort(draws.random(len(named)).astype(np.float32))[::-1].copy()
    return Detections(image_id, boxes.astype(np.float32), scores, named)
