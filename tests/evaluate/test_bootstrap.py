"""Intervals of differences: against hotcoco's own, and where the answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hotcoco import COCOeval, compare

from ray_det.data.truth import annotations_of
from ray_det.evaluate import hotcoco_scorer
from ray_det.evaluate.bootstrap import ap_of_samples, difference
from ray_det.evaluate.coco_eval import coco_metrics
from ray_det.evaluate.results import Results
from tests.evaluate.test_coco_eval import manifest_of, noisy


@pytest.fixture(scope="module")
def split(small_coco, tmp_path_factory):
    return manifest_of(small_coco["train"], tmp_path_factory.mktemp("cache"))


def test_a_sample_of_one_image_is_that_image(split):
    results = Results.of(noisy(split))
    for image_id in split.table["image_id"].to_pylist()[:3]:
        one = replace(split, table=split.table.filter(split.table["image_id"].to_numpy() == image_id))
        own = results.take(np.flatnonzero(results.image_of_N == image_id))
        own = replace(own, image_ids_I=np.array([image_id]))
        (samples,) = ap_of_samples(one, [own], samples=3).T
        assert samples == pytest.approx([coco_metrics(one, own)["AP"]] * 3, abs=1e-12)


def test_intervals_are_those_of_hotcoco(split):
    a, b = (Results.of(noisy(split, seed)) for seed in (0, 1))
    samples_SR = ap_of_samples(split, [a, b], samples=400)
    mean = coco_metrics(split, b)["AP"] - coco_metrics(split, a)["AP"]
    ours = difference(samples_SR[:, :1], samples_SR[:, 1:], mean)
    theirs = compare(*(evaluated(split, one) for one in (a, b)), n_bootstrap=2000, seed=1)
    assert theirs["deltas"]["AP"] == pytest.approx(mean, abs=1e-9)
    low, high = (theirs["ci"]["AP"][end] for end in ("lower", "upper"))
    width = high - low
    assert ours.low == pytest.approx(low, abs=0.2 * width) and ours.high == pytest.approx(high, abs=0.2 * width)


def evaluated(split, results: Results) -> COCOeval:
    truth, found = hotcoco_scorer.read(annotations_of(split), results, np.unique(split.table["image_id"].to_numpy()))
    dataset = hotcoco_scorer.truth_of(truth, len(split), len(split.classes))
    evaluation = COCOeval(dataset, dataset.load_res(found), "bbox")
    evaluation.evaluate()
    return evaluation


def test_what_all_samples_have_in_common_is_no_uncertainty():
    a_SR = np.random.default_rng(0).random((500, 3))
    found = difference(a_SR, a_SR + 0.1, 0.1)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))
    noise = difference(a_SR, np.random.default_rng(1).random((500, 3)), 0.0)
    assert noise.low < -0.3 and noise.high > 0.3
    of_runs = np.tile([0.0, 0.0, 0.3], (500, 1))  # one of three runs makes the difference
    assert difference(np.zeros((500, 3)), of_runs, 0.1).low == 0.0
