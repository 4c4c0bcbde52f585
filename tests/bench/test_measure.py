"""Ratios of arms that take turns."""

from __future__ import annotations

import json

import pytest
import torch

from ray_det.bench.measure import Arm, compare, single, table


def recorded(name: str, values: list[float], order: list[str]) -> Arm:
    rest = iter(values)

    def run() -> float:
        order.append(name)
        return next(rest)

    return Arm(name, run, {"threads": 1})


def test_arms_take_turns_and_the_ratio_is_of_neighbours():
    order: list[str] = []
    # The machine becomes ten times slower on the way: medians of each arm alone would say 20 / 40.
    ours, peer = recorded("ours", [0, 2, 2, 20], order), recorded("peer", [0, 1, 4, 40], order)
    figure = compare("speed", "s", ours, peer, repeats=3, target="<= 0.5x")
    assert order == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert (figure.value, figure.peer_value, figure.ratio, figure.met) == (2, 4, 0.5, True)
    line = json.loads(json.dumps(figure.to_json()))
    assert (line["values"], line["peer_values"], line["met"]) == ([2, 2, 20], [1, 4, 40], True)
    assert ("amx_bf16" in line["machine"]["processor"]) is torch.cpu._is_amx_tile_supported()
    assert line["machine"]["cores"] >= 1 and line["machine"]["versions"]["torch"]


def test_arms_that_need_no_warm_up_have_none():
    order: list[str] = []
    ours, peer = recorded("ours", [2], order), recorded("peer", [4], order)
    figure = compare("speed", "s", ours, peer, repeats=1, warm_up=False)
    assert (order, figure.ratio) == (["ours", "peer"], 0.5)


def test_a_figure_without_a_peer_and_its_target():
    order: list[str] = []
    figure = single("start", "s", recorded("job", [99, 14, 16, 17], order), repeats=3, target="<= 15")
    assert (figure.value, figure.ratio, figure.met) == (16, None, False)
    assert "missed" in table([figure])


def test_a_wrong_target_is_refused_before_anything_runs():
    order: list[str] = []
    with pytest.raises(ValueError, match="faster"):
        single("start", "s", recorded("job", [1], order), repeats=1, target="faster")
    assert order == []
