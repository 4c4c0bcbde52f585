"""A profiled run: what it writes, and that it is no other run."""

from __future__ import annotations

import gzip
import json

import pytest

from ray_det.train.profile import PHASES
from tests.train.runner import records, run_alone
from tests.train.test_equivalence import spec, with_optim

SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("fcos", "fasterrcnn")]


@pytest.mark.parametrize("family", ["d_fine", *SLOW])
def test_a_trace_and_the_split_of_a_step(family, small_coco, tmp_path):
    asked = spec(small_coco, tmp_path, family, epochs=1)
    asked["config"]["data"] |= {"val": None, "test": None}
    asked["config"]["train"] |= {"profile_steps": 1, "checkpoint_every_steps": 0}
    run = run_alone(with_optim(asked, {"ema_decay": 0.9}))
    trace = json.loads(gzip.open(run / "profile" / "trace.json.gz").read())
    seen = {event.get("name") for event in trace["traceEvents"]}
    assert {*PHASES, "aten::linear" if family == "d_fine" else "aten::convolution"} <= seen
    split = json.loads((run / "profile" / "split.json").read_text())
    assert all(split[f"{phase.replace(' ', '_').replace('-', '_')}_ms"] > 0 for phase in PHASES)
    parts = sum(value for name, value in split.items() if name != "step_ms")
    assert 0.5 * split["step_ms"] < parts <= 1.01 * split["step_ms"]
    logged = [r for r in records(run) if any(key.startswith("profile/") for key in r)]
    assert [r["global_step"] for r in logged] == [3]
    assert {key.removeprefix("profile/"): v for key, v in logged[0].items() if key.startswith("profile/")} == split
