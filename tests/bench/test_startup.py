"""`jobs/bench.py startup`: a job that does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_det.bench import startup
from ray_det.types import UserError


def test_a_job_that_ends_is_not_waited_for_and_its_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job.py"
    job.write_text("import sys; print('a warning', file=sys.stderr); sys.exit('error: unknown model')")
    monkeypatch.setattr(startup, "JOB", job)
    with pytest.raises(UserError, match="ended before its first step, status 1: error: unknown model$"):
        startup.first_step_s(startup.Config(), tmp_path, "run0", [])


def test_a_job_that_makes_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job.py"
    job.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(startup, "JOB", job)
    with pytest.raises(UserError, match="no step within --timeout_s 0.1"):
        startup.first_step_s(startup.Config(timeout_s=0.1), tmp_path, "run0", [])
