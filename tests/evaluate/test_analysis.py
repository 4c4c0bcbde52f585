"""Errors of every kind by hand, and curves that are COCO's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_det.data.truth import ground_truth
from ray_det.evaluate import pycocotools_scorer
from ray_det.evaluate.analysis import ERRORS, Analysis, analyse
from ray_det.evaluate.coco_eval import coco_metrics
from ray_det.evaluate.f1 import Best, f1_of
from ray_det.evaluate.results import Results
from ray_det.types import Detections
from tests.evaluate.kinds import KINDS, SIDE, drawn
from tests.evaluate.test_coco_eval import manifest_of, noisy
from tests.evaluate.test_hotcoco_scorer import as_manifest

A, B = 0, 1
OBJECTS = [(1, A, 0, 0, 50, 50), (1, B, 100, 0, 50, 50), (2, A, 0, 0, 40, 40)]
"""(image, label, x, y, w, h); image 3 has none."""
FOUND = [(*OBJECTS[0], 0.9), (*OBJECTS[1], 0.8), (*OBJECTS[2], 0.7)]
CROWD = (2, B, 100, 100, 90, 90)
RECALLS = 101


def analysed(found: list[tuple], crowds: list[tuple] = []) -> Analysis:  # noqa: B006
    annotations = [
        {
            "id": i,
            "image_id": o[0],
            "category_id": o[1],
            "bbox": o[2:],
            "area": o[4] * o[5],
            "iscrowd": int(o in crowds),
        }
        for i, o in enumerate([*OBJECTS, *crowds], start=1)
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": SIDE, "width": SIDE} for i in (1, 2, 3)]
    categories = [{"id": label, "name": name} for label, name in enumerate("ab")]
    manifest = as_manifest({"images": images, "annotations": annotations, "categories": categories})
    by_image = []
    for image in (1, 2, 3):
        own = sorted((f for f in found if f[0] == image), key=lambda f: -f[6])
        boxes = np.array([[x, y, x + w, y + h] for _, _, x, y, w, h, _ in own], np.float32).reshape(-1, 4)
        scores, labels = np.array([f[6] for f in own], np.float32), np.array([f[1] for f in own], np.int64)
        by_image.append(Detections(image, boxes, scores, labels))
    return analyse(manifest, Results.of(by_image))


def expect(analysis: Analysis, ap50: float, confusion: list[list[int]], worst: list[tuple], **errors: float) -> None:
    """Errors are by how much AP50 grows without them; each is there once, and no others."""
    assert np.nanmean(analysis.precision_RK) == pytest.approx(ap50)
    assert analysis.confusion_KK.tolist() == confusion
    assert [tuple(image) for image in analysis.worst] == [pytest.approx(image) for image in worst]
    assert analysis.error_counts == {name: int(name in errors) for name in ERRORS}
    assert analysis.error_dap == pytest.approx({name: errors.get(name, 0) for name in ERRORS})


def test_all_found():
    analysis = analysed(FOUND)
    expect(analysis, 1, [[2, 0, 0], [0, 1, 0], [0, 0, 0]], [])
    assert analysis.f1.macro == analysis.f1.micro == pytest.approx(Best(1, 0.7, 1, 1))
    assert analysis.f1.classes_K == [pytest.approx(Best(1, 0.7, 1, 1)), pytest.approx(Best(1, 0.8, 1, 1))]
    assert (analysis.images, analysis.objects_K.tolist()) == (3, [2, 1])


def test_a_duplicate():
    """Found, again, found: precision 2/3 at the upper half of the recalls of class a."""
    loss = (1 - 2 / 3) * 50 / RECALLS / 2
    analysis = analysed([*FOUND, (1, A, 2, 0, 50, 50, 0.85)])
    expect(analysis, 1 - loss, [[2, 0, 0], [0, 1, 0], [1, 0, 0]], [(1, 4 / 5, 2, 1, 0)], duplicate=loss)


def test_a_wrong_class():
    """Class b has nothing; class a has a false positive amid its two."""
    loss = (1 - 2 / 3) * 50 / RECALLS / 2 + 1 / 2
    analysis = analysed([FOUND[0], (1, A, *FOUND[1][2:]), FOUND[2]])
    expect(analysis, 1 - loss, [[2, 0, 0], [1, 0, 0], [0, 0, 0]], [(1, 1 / 2, 1, 1, 1)], classification=loss)
    assert analysis.f1.classes_K[B] == Best(0, 1, 0, 0)
    a = 2 * 2 / (3 + 2)
    assert analysis.f1.macro == pytest.approx(Best(a / 2, 0.7, (2 / 3) / 2, 1 / 2))
    assert analysis.f1.micro == pytest.approx(Best(2 * 2 / (3 + 3), 0.7, 2 / 3, 2 / 3))


def test_a_shifted_box():
    """IoU 16 / 64. Half of class a's objects are found: 51 of the 101 recalls."""
    loss = 50 / RECALLS / 2
    analysis = analysed([*FOUND[:2], (2, A, 24, 0, 40, 40, 0.85)])
    best = analysis.f1.macro  # without it: both found at 0.9 and 0.8, but its score lies between
    assert best == pytest.approx(Best((2 / 4 + 1) / 2, 0.8, (1 / 2 + 1) / 2, (1 / 2 + 1) / 2))
    expect(analysis, 1 - loss, [[1, 0, 1], [0, 1, 0], [1, 0, 0]], [(2, 0, 0, 1, 1)], localization=loss)


@pytest.mark.parametrize("kind, box", [("background", (150, 150, 40, 40)), ("both", (24, 0, 40, 40))])
def test_on_nothing_or_shifted_and_of_the_wrong_class(kind, box):
    analysis = analysed([*FOUND, (2, B, *box, 0.95)])
    expect(analysis, 3 / 4, [[2, 0, 0], [0, 1, 0], [0, 1, 0]], [(2, 2 / 3, 1, 1, 0)], **{kind: 1 / 4})


def test_a_better_score_of_the_wrong_class_takes_the_object():
    """In the matrix the right detection has no object left then; AP and F1 of its class have it right."""
    analysis = analysed([*FOUND, (1, B, *OBJECTS[0][2:], 0.95)])
    assert analysis.confusion_KK.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert analysis.f1.classes_K[A] == pytest.approx(Best(1, 0.7, 1, 1))


def test_a_miss():
    loss = 50 / RECALLS / 2
    expect(analysed(FOUND[:2]), 1 - loss, [[1, 0, 1], [0, 1, 0], [0, 0, 0]], [(2, 0, 0, 0, 1)], missed=loss)


def test_a_crowd_takes_detections_of_its_class_and_is_no_object():
    inside = (120, 120, 20, 20)
    expect(analysed([*FOUND, (2, B, *inside, 0.95)], [CROWD]), 1, [[2, 0, 0], [0, 1, 0], [0, 0, 0]], [])
    other = analysed([*FOUND, (2, A, *inside, 0.95)], [CROWD])
    loss = ((1 - 2 / 3) * RECALLS) / RECALLS / 2  # a false positive before two: 1/2 and 2/3, the larger for both
    worst = [(2, 2 / 3, 1, 1, 0)]
    expect(other, 1 - loss, [[2, 0, 0], [0, 1, 0], [1, 0, 0]], worst, background=loss)


def test_half_in_a_crowd_is_background():
    """A third of it lies in the crowd: an error, and the crowd is no object that it is near."""
    analysis = analysed([*FOUND, (2, B, 85, 100, 22.5, 30, 0.95)], [CROWD])
    worst = [(2, 2 / 3, 1, 1, 0)]
    expect(analysis, 3 / 4, [[2, 0, 0], [0, 1, 0], [0, 1, 0]], worst, background=1 / 4)


def test_below_the_best_score_nothing_is_confused_and_the_image_is_fine():
    analysis = analysed([*FOUND, (3, B, 9, 9, 50, 50, 0.1)])
    expect(analysis, 1, [[2, 0, 0], [0, 1, 0], [0, 0, 0]], [], background=0)
    assert analysis.f1.macro == pytest.approx(Best(1, 0.7, 1, 1))


def test_a_hundred_detections_of_an_image_and_class_count():
    many = [(3, B, 9, 9, 50, 50, 0.99 - i / 1000) for i in range(150)]
    analysis = analysed([*FOUND, *many])
    assert analysis.error_counts["background"] == 100
    assert analysis.f1.classes_K[B] == pytest.approx(Best(2 / (101 + 1), 0.8, 1 / 101, 1))


def test_worst_is_the_lowest_f1_then_the_most_errors():
    analysis = analysed([FOUND[0], FOUND[2], (1, A, 100, 100, 30, 30, 0.8), (3, B, 9, 9, 50, 50, 0.8)])
    assert [image.image_id for image in analysis.worst] == [3, 1]
    analysis = analysed([FOUND[0], (3, A, 9, 9, 50, 50, 0.95), (3, A, 109, 9, 50, 50, 0.95)])
    assert [(image.image_id, image.f1) for image in analysis.worst] == [(3, 0), (2, 0), (1, 2 / 3)]


def test_nothing_found_and_nothing_there():
    analysis = analysed([])
    assert analysis.f1.macro == analysis.f1.micro == Best(0, 1, 0, 0)
    assert analysis.confusion_KK.tolist() == [[0, 0, 2], [0, 0, 1], [0, 0, 0]]
    assert not analysis.f1.macro_S.any() and not analysis.precision_RK.any()
    document, found = drawn(0, ["nothing_annotated"])
    analysis = analyse(as_manifest(document), Results.of(found))
    assert analysis.f1.macro == analysis.f1.micro == Best(-1, -1, -1, -1)
    assert np.isnan(analysis.precision_RK).all() and np.isnan(analysis.f1.classes_KS).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sets(st.sampled_from(sorted(KINDS)), max_size=4))
def test_it_is_sound_whatever_the_data_are_like(seed: int, kinds: set[str]):
    document, found = drawn(seed, sorted(kinds))
    manifest, results = as_manifest(document), Results.of(found)
    analysis = analyse(manifest, results)
    numbers = {"boxes_that_are_no_numbers", "detections_that_are_no_numbers", "id_zero", "far_and_huge"}
    if not kinds & numbers:  # pycocotools has ways of its own with these
        curves = pycocotools_scorer.curves(ground_truth(manifest), results.to_coco(manifest.classes))
        assert np.array_equal(np.nan_to_num(analysis.precision_RK, nan=-1), curves.precision_TRKAD[0, :, :, 0, -1])
    if not kinds & (numbers | {"other_areas"}):
        assert (analysis.confusion_KK[:-1].sum(axis=1) == analysis.objects_K).all()
    assert all(0 <= image.f1 < 1 and image.wrong + image.missed for image in analysis.worst)


@pytest.mark.parametrize("name", ["bccd", "coco_cc"])
def test_curves_of_real_data_have_coco_s_ap50(real_data, tmp_path, name):
    manifest = manifest_of(real_data / name / "val.json", tmp_path)
    results = Results.of(noisy(manifest))
    analysis = analyse(manifest, results)
    metrics = coco_metrics(manifest, results)
    assert np.nanmean(analysis.precision_RK) == pytest.approx(metrics["AP50"], abs=1e-12)
    assert 0.2 < metrics["AP50"] < 0.9
    absent = [metrics[f"AP/{name}"] == -1 for name in manifest.classes.names]
    assert np.isnan(analysis.precision_RK).all(axis=0).tolist() == absent
    assert analysis.confusion_KK[:-1].sum(axis=1).tolist() == analysis.objects_K.tolist()


def kept_by(threshold: float, scores: np.ndarray, labels: np.ndarray, hits: np.ndarray, objects: np.ndarray) -> Any:
    """(micro F1, F1 by class) by counting."""
    kept = scores >= threshold
    tp = np.array([(hits & kept & (labels == k)).sum() for k in range(len(objects))])
    found = np.array([(kept & (labels == k)).sum() for k in range(len(objects))])
    return 2 * tp.sum() / (found.sum() + objects.sum()), 2 * tp / (found + objects)


def test_f1_is_that_of_counting_at_every_threshold():
    draws = np.random.default_rng(3)
    scores = draws.random(60).round(1)  # with ties
    labels, hits = draws.integers(0, 3, 60), draws.random(60) < scores
    objects = np.array([hits[labels == k].sum() + k for k in range(3)])
    f1 = f1_of(scores, labels, hits, objects)
    counted = {t: kept_by(t, scores, labels, hits, objects) for t in np.unique(scores)}
    assert f1.micro.f1 == pytest.approx(max(micro for micro, _ in counted.values()))
    assert f1.micro.f1 == pytest.approx(counted[f1.micro.threshold][0])
    assert f1.macro.f1 == pytest.approx(max(by.mean() for _, by in counted.values()))
    assert f1.macro.f1 == pytest.approx(counted[f1.macro.threshold][1].mean())
    for k, best in enumerate(f1.classes_K):
        assert best.f1 == pytest.approx(max(by[k] for _, by in counted.values()))
    for i in (0, 17, 30, 55, 100):
        micro, by = kept_by(i / 100, scores, labels, hits, objects)
        assert (f1.micro_S[i], f1.macro_S[i]) == pytest.approx((micro, by.mean()))
        assert f1.classes_KS[:, i] == pytest.approx(by)


def test_classes_without_objects_are_no_part_of_the_mean():
    scores, labels, hits = np.array([0.9, 0.8]), np.array([0, 1]), np.array([True, False])
    f1 = f1_of(scores, labels, hits, np.array([1, 0]))
    assert f1.macro == f1.micro == Best(1, 0.9, 1, 1)
    assert f1.classes_K[1] == Best(-1, -1, -1, -1)
