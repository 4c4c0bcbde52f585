"""Run a job's script in this process, as its command line does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from ray_det import cli

JOBS = Path(__file__).parents[2] / "jobs"


def run_job(name: str, *arguments: object) -> int:
    """Exit status of `python jobs/<name>.py <arguments>`."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as __main__ would be: pydantic looks annotations up there
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, arguments)]
    try:
        spec.loader.exec_module(module)
        cli.main(module.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0
