"""The job that evaluates, where the storage of its images is out of reach."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from ray_det.data.manifest import write_manifest
from ray_det.data.prepare import make
from ray_det.retry import PATIENCE_S
from tests.jobs.run import JOBS
from tests.predict.conftest import write_checkpoint
from tests.s3 import nowhere


@pytest.mark.slow
@pytest.mark.ray
def test_images_out_of_reach_end_it_with_one_line_as_soon_as_asked(small_coco, tmp_path):
    model = write_checkpoint(tmp_path / "model")
    manifest = replace(make(str(small_coco["val"]), None)[0], root="s3://bucket/images")
    write_manifest(manifest, tmp_path / "val.parquet")
    command = [sys.executable, "-W", "ignore", str(JOBS / "eval.py"), "--checkpoint", str(model)]
    command += ["--data.val", str(tmp_path / "val.parquet"), "--output", str(tmp_path / "out"), "--batch_size", "2"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--workers.storage_timeout_s", "1"], env=os.environ | nowhere(), capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot read s3://bucket/images/"), done.stderr
    assert time.monotonic() - began < PATIENCE_S, "the default was waited for"
