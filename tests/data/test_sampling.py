"""Repeat factors are the paper's, epochs have one length, classes get their share."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_det.config import DatasetConfig
from ray_det.data.plan import plan_epoch, steps_per_epoch
from ray_det.data.sampling import ONE, ClassBalanced, RepeatFactor, occurrences, repeat_factors, sampler_of
from ray_det.types import UserError

# Class 0 in four of eight images, class 1 in one, class 2 in two; crowds and defects are not counted.
LABELS = [[0, 0], [0, 1], [0], [0, 2], [2], [], [0], []]
BOX_OK = [[1, 1], [1, 1], [1], [1, 1], [1], [], [0], []]
BY_HAND = [1, 2, 1, math.sqrt(2), math.sqrt(2), 1, 1, 1]  # of a threshold of a half


def table(labels=LABELS, box_ok=BOX_OK) -> pa.Table:
    ok = [[bool(one) for one in row] for row in box_ok]
    types = {"labels": pa.list_(pa.int32()), "box_ok": pa.list_(pa.bool_())}
    return pa.table({k: pa.array(v, types[k]) for k, v in (("labels", labels), ("box_ok", ok))})


def sampler(kind: str, labels=LABELS, box_ok=BOX_OK, threshold: float = 0.5):
    config = DatasetConfig.model_validate({"sampling": kind, "repeat_threshold": threshold})
    return sampler_of(table(labels, box_ok), np.arange(len(labels)), config)


def test_factors_by_hand():
    """f = 4/8, 1/8 and 2/8; sqrt(t / f) = 1, 2 and sqrt(2); an image has its rarest class's."""
    repeat = sampler("repeat_factor")
    assert isinstance(repeat, RepeatFactor)
    assert repeat.factors_N / ONE == pytest.approx(BY_HAND, abs=1e-6)
    assert repeat.images == math.ceil(sum(BY_HAND)) == 10


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=30), st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_factors_are_those_of_the_formula(labels, threshold):
    """f(c), r(c) and r(I) as in the paper, image by image."""
    share = {c: sum(c in one for one in labels) / len(labels) for c in range(6)}
    expected = [max([1.0, *(math.sqrt(threshold / share[c]) for c in one)]) for one in labels]
    pairs = np.array([(i, c) for i, one in enumerate(labels) for c in set(one)], int).reshape(-1, 2)
    found = repeat_factors(pairs[:, 0], pairs[:, 1], len(labels), threshold)
    assert found / ONE == pytest.approx(expected, abs=1e-6) and found.min() >= ONE


def test_images_are_seen_as_often_as_their_factor_says():
    repeat, epochs = sampler("repeat_factor"), 3000
    assert repeat is not None
    counts = np.stack([np.bincount(repeat.draw(np.random.default_rng([1, e])), minlength=8) for e in range(epochs)])
    assert set(counts.sum(axis=1)) == {10}
    assert (counts >= np.floor(BY_HAND)).all() and (counts <= np.ceil(BY_HAND) + 1).all()
    filled = (10 - sum(BY_HAND)) / 8  # what is missing of the last image, over all
    assert counts.mean(axis=0) == pytest.approx(np.array(BY_HAND) + filled, abs=0.04)
    rare = counts[:, 1].mean() / counts[:, 0].mean()
    assert rare == pytest.approx(2 / 1, rel=0.03), "the rare class's image comes twice as often"


@given(st.lists(st.integers(ONE, 5 * ONE), min_size=1, max_size=40), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_an_epoch_has_always_as_many_images(factors, seed):
    repeat = RepeatFactor(np.array(factors))
    before = repeat.factors_N.copy()
    counts = np.bincount(repeat.draw(np.random.default_rng(seed)), minlength=len(factors))
    assert counts.sum() == repeat.images == math.ceil(sum(factors) / ONE)
    assert (counts >= before // ONE).all() and (np.maximum(counts - -(-before // ONE), 0)).sum() <= 1
    assert np.array_equal(repeat.factors_N, before)


def test_classes_get_equal_shares_and_their_images_too():
    labels = [[0]] * 50 + [[1]] * 7 + [[2]] + [[]] * 4
    balanced = sampler("class_balanced", labels, [[1] * len(one) for one in labels])
    assert isinstance(balanced, ClassBalanced) and balanced.images == 62
    for epoch in range(20):
        counts = np.bincount(balanced.draw(np.random.default_rng(epoch)), minlength=62)
        classes = [counts[:50].sum(), counts[50:57].sum(), counts[57], counts[58:].sum()]
        assert sorted(classes[:3]) == [20, 21, 21] and classes[3] == 0
        assert np.ptp(counts[:50]) <= 1 and np.ptp(counts[50:57]) <= 1


def test_an_image_of_two_classes_is_in_the_turns_of_both():
    balanced = sampler("class_balanced")
    assert isinstance(balanced, ClassBalanced)
    assert [m.tolist() for m in balanced.members] == [[0, 1, 2, 3], [1], [3, 4]], "image 6 has a crowd only"


def test_balancing_nothing_is_refused():
    with pytest.raises(UserError, match=r"data\.sampling class_balanced: no image has a box"):
        sampler("class_balanced", [[0]], [[0]])
    repeat = sampler("repeat_factor", [[0], []], [[0], []])
    assert isinstance(repeat, RepeatFactor) and repeat.factors_N.tolist() == [ONE, ONE]
    assert sampler("uniform") is None


def test_occurrences_count_from_zero():
    assert occurrences(np.array([3, 1, 3, 3, 0, 1])).tolist() == [0, 0, 1, 2, 0, 1]
    assert occurrences(np.array([], int)).tolist() == []


@pytest.mark.parametrize("kind", ["repeat_factor", "class_balanced"])
@pytest.mark.parametrize("last_batch", ["wrap", "drop"])
def test_epochs_of_a_plan_have_the_same_steps_and_differ(kind, last_batch):
    """Every draw has a number of its own among those of its image, and rows are the manifest's."""
    rng = np.random.default_rng(0)
    labels = [[0]] * 150 + [[1, 0]] * 20 + [[2]] * 3
    config = DatasetConfig.model_validate(
        {"sampling": kind, "repeat_threshold": 0.3, "window": 3, "last_batch": last_batch}
    )
    rows = np.arange(10, 183)
    whole = table([[]] * 10 + labels, [[]] * 10 + [[1] * len(one) for one in labels])
    drawn = sampler_of(whole, rows, config)
    assert drawn is not None
    heights, widths = rng.integers(100, 500, (2, 173))
    plans = [
        plan_epoch(heights, widths, rows, config, micro_batches=2, micro_batch_size=4, divisor=32, seed=1, epoch=e,
                   sampler=drawn)
        for e in (0, 1, 2, 2)
    ]  # fmt: skip
    assert {plan.steps for plan in plans} == {steps_per_epoch(drawn.images, 8, last_batch)}
    assert np.array_equal(plans[2].rows_SMB, plans[3].rows_SMB)
    assert not np.array_equal(plans[0].rows_SMB, plans[1].rows_SMB)
    for plan in plans:
        assert plan.wrapped - plan.dropped == plan.steps * 8 - drawn.images
        assert plan.rows_SMB.min() >= 10 and np.isin(plan.rows_SMB, np.arange(180, 183)).sum() > 3 * 3
        pairs = np.stack([plan.rows_SMB.ravel(), plan.occurrence_SMB.ravel()], axis=1)
        assert len(np.unique(pairs, axis=0)) == len(pairs) - plan.wrapped
        rest = plan.assign(1, 2, start_step=3)
        assert np.array_equal(rest.occurrence, plan.occurrence_SMB[3:, 1].ravel())
        assert np.array_equal(rest.slice(2, 4).occurrence, rest.occurrence[8:16])
        assert np.array_equal(rest.rows, plan.rows_SMB[3:, 1].ravel())
