"""`jobs/predict.py` on a real Ray: what it leaves, and how it goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

import ray_det
from ray_det.storage import Folder
from tests.jobs.run import JOBS, run_job
from tests.predict.conftest import write_checkpoint
from tests.predict.test_inputs import names

pytestmark = pytest.mark.ray


def written(output: Path) -> dict[str, int]:
    """When every part was."""
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob("part-*.parquet")}


@pytest.mark.usefixtures("ray_cluster")
def test_it_writes_all_images_once_and_does_only_what_is_missing(checkpoint, photos, tmp_path, capfd):
    output = tmp_path / "out"
    arguments = ("--checkpoint", checkpoint, "--input", photos, "--output", output, "--shard_images", 4)
    arguments += ("--pictures", 2, "--workers.num", 1, "--workers.threads", 1)
    assert run_job("predict", *arguments) == 0
    said = capfd.readouterr().out
    assert re.search(r"^\[#+\.*\] \d+/9  images", said, re.M) and not re.search(r"[\x00-\x09\x0b-\x1f]", said), said
    assert "not readable, without detections: cut.jpg: " in said and "text.png: not an image" in said
    images = pq.read_table(output / "images.parquet").sort_by("image_id").to_pylist()
    assert [(row["image_id"], row["file_name"]) for row in images] == list(enumerate(names(photos), 1))
    lost = [json.loads(line)["file"] for line in (output / "skipped_images.jsonl").read_text().splitlines()]
    assert lost == ["cut.jpg", "text.png"] == [row["file_name"] for row in images if row["problem"]]
    assert sorted(path.name for path in (output / "pictures").iterdir()) == ["9.jpg"]  # the first is not readable
    found = json.loads((output / "detections.json").read_text())
    assert len(found) == len(pq.read_table(output / "detections.parquet")) > 0
    detector = ray_det.load(str(checkpoint), device="cpu")
    alone = detector.predict([photos / images[3]["file_name"]])[0]
    scores = [record["score"] for record in found if record["image_id"] == 4]
    assert np.allclose(scores, alone.scores_N, atol=1e-4)

    before, text = written(output), (output / "detections.json").read_text()
    assert run_job("predict", *arguments) == 0 and written(output) == before
    (output / "images.parquet" / "part-000000.parquet").unlink()
    capfd.readouterr()
    assert run_job("predict", *arguments, "--on_bad_image", "fail") == 2
    error = capfd.readouterr().err.strip()
    assert "image 1 cannot be read: cut.jpg" in error and len(error.splitlines()) == 1, error
    assert run_job("predict", *arguments) == 0
    assert "5 of 9 images are done already" in capfd.readouterr().out
    after = written(output)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"images.parquet/part-000000.parquet", "detections.parquet/part-000000.parquet"}
    assert (output / "detections.json").read_text() == text


@pytest.mark.usefixtures("ray_cluster")
def test_what_changes_the_result_is_refused(checkpoint, photos, tmp_path, capfd, monkeypatch):
    from ray_det.predict import job

    output = tmp_path / "out"
    monkeypatch.setattr(job, "_run", lambda *args: pytest.fail("it predicts"))
    fixed = ("--input", photos, "--output", output)
    Folder.at(str(output)).write_text("predict.json", json.dumps({"format": 1, "checkpoint": "other", "images": 9}))
    assert run_job("predict", "--checkpoint", checkpoint, *fixed) == 2
    error = capfd.readouterr().err.strip()
    assert "differs in checkpoint, " in error and "--overwrite" in error and len(error.splitlines()) == 1
    assert run_job("predict", "--checkpoint", checkpoint, *fixed, "--workers.num", 64, "--overwrite") == 2
    assert "no room for 64 workers" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_killed_driver_goes_on_where_it_was(small_coco, tmp_path, request, where):
    """No image twice, none missing, no finished shard again, and the same result as of a prediction in one go."""
    if where == "s3":
        request.getfixturevalue("s3")
    model, photos = write_checkpoint(tmp_path / "model"), tmp_path / "photos"
    photos.mkdir()
    originals = sorted((small_coco["val"].parent / "images").glob("*.jpg"))
    for i in range(120):
        shutil.copy(originals[i % len(originals)], photos / f"{i:03}.jpg")
    (photos / "050.jpg").write_bytes(b"no image")
    root = tmp_path if where == "disk" else "s3://bucket/killed"
    if where == "s3":
        Folder.at(f"{root}/photos").upload(photos)
    source = f"{root}/photos" if where == "disk" else f"{root}/photos/*.jpg"
    killed, whole = f"{root}/killed", f"{root}/whole"
    first = start(tmp_path, model, source, killed)
    deadline = time.monotonic() + 240
    while len(parts(killed)) < 3:
        assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(3)  # whatever an actor was writing
    before = parts(killed)
    assert 3 <= len(before) < 30
    for output in (killed, whole):
        assert start(tmp_path, model, source, output).wait(timeout=400) == 0, (tmp_path / "log").read_text()
    after = parts(killed)
    assert len(after) == 30 and {name: after[name] for name in before} == before
    system, path = fs.FileSystem.from_uri(killed)
    images = pq.read_table(f"{path}/images.parquet", filesystem=system).sort_by("image_id")
    assert images["image_id"].to_pylist() == list(range(1, 121))
    assert [row["file_name"] for row in images.to_pylist() if row["problem"]] == ["050.jpg"]
    results = [Folder.at(output).read_text("detections.json") for output in (killed, whole)]
    assert results[0] == results[1]
    assert {record["image_id"] for record in json.loads(results[0])} == set(range(1, 121)) - {51}


def start(tmp_path: Path, model: Path, source: str, output: str) -> subprocess.Popen:
    options = ["--shard_images", "4", "--workers.threads", "1"]
    command = [sys.executable, JOBS / "predict.py", "--checkpoint", model, "--input", source, "--output", output]
    environment = os.environ | {"HOME": str(tmp_path)}
    with (tmp_path / "log").open("a") as log:
        return subprocess.Popen([*map(str, command), *options], env=environment, stdout=log, stderr=log)


def parts(output: str) -> dict[str, int]:
    """Shards that are done, and when they were written."""
    system, path = fs.FileSystem.from_uri(output)
    found = system.get_file_info(fs.FileSelector(f"{path}/images.parquet", allow_not_found=True))
    return {info.base_name: info.mtime_ns for info in found if re.fullmatch(r"part-\d+\.parquet", info.base_name)}
