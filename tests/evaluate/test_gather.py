"""Detections of all ranks: joined on rank 0, every image exactly once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ray_det.evaluate.gather import gather_lists, require_each_once
from tests.evaluate.gather_worker import IDS, as_json, results
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What two plain gloo processes got."""
    folder = tmp_path_factory.mktemp("gather")
    run_ranks("tests.evaluate.gather_worker", folder, world=2)
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(2)]


def test_rank_0_has_all_and_the_others_none(ranks):
    assert ranks[0]["joined"] == as_json([results((*IDS[0], *IDS[1]))])
    assert ranks[1]["joined"] is None


def test_a_rank_may_have_nothing(ranks):
    assert ranks[0]["one_empty"] == as_json([results(IDS[1])])
    assert ranks[1]["one_empty"] is None


def test_rank_0_is_the_group_s_own(ranks):
    assert ranks[0]["turned"] is None
    assert sorted(ranks[1]["turned"]) == [0, 1]


def test_one_process_needs_no_group():
    assert gather_lists([3, 1, 2]) == [3, 1, 2]


def test_every_image_once_in_any_order_passes():
    require_each_once(results((30, 10, 20)), np.array([10, 20, 30]))
    require_each_once(results(()), np.array([], np.int64))


def test_missing_images_are_named():
    with pytest.raises(RuntimeError, match=r"2 missing \(first \[20, 40\]\), 0 repeated \(first \[\]\)"):
        require_each_once(results((30, 10)), np.array([10, 20, 30, 40]))


def test_repeated_images_are_named():
    with pytest.raises(RuntimeError, match=r"0 missing \(first \[\]\), 1 repeated \(first \[20\]\)"):
        require_each_once(results((20, 30, 10, 20)), np.array([10, 20, 30]))


def test_one_repeated_in_place_of_one_missing_is_an_error():
    with pytest.raises(RuntimeError, match=r"1 missing \(first \[30\]\), 1 repeated \(first \[20\]\)"):
        require_each_once(results((20, 10, 20)), np.array([10, 20, 30]))
