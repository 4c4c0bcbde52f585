"""`jobs/prepare.py` as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ray_det.data.embedded import generate
from ray_det.data.manifest import read_manifest
from ray_det.data.prepare import make

JOB = Path(__file__).parents[2] / "jobs" / "prepare.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOB), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a box without height and a missing picture."""
    path = generate(tmp_path_factory.mktemp("data"), train=6, val=1, test=1)["train"]
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"][3] = 0
    path.write_text(json.dumps(document))
    (path.parent / "images" / "train_0006.jpg").unlink()
    return path


def test_writes_manifest_and_report_and_prints_the_table(source: Path, tmp_path: Path) -> None:
    done = run("--source", source, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("degenerate_box", "missing_file", "train_0006.jpg: no such file", "annotation 1: ["):
        assert part in done.stdout
    manifest = read_manifest(tmp_path / "out" / "manifest.parquet")
    assert len(manifest) == 6 and manifest.root == str(source.parent / "images")
    report = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert report["counts"]["degenerate_box"] == report["counts"]["missing_file"] == 1
    assert report["findings"]["missing_file"]["examples"][0]["file"] == "train_0006.jpg"


def test_strict_lists_everything_and_writes_no_manifest(source: Path, tmp_path: Path) -> None:
    done = run("--source", source, "--output", tmp_path / "out", "--strict")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "2 errors" in done.stderr
    assert "train_0006.jpg" in done.stdout
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["preflight.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "gone.json", "--output", "out"], "no such file: gone.json"),
        (["--source", "{source}", "--output", "out", "--images", "/nowhere"], "is under /nowhere"),
        (["--source", "{source}", "--ouput", "out"], "--output"),
        (["--output", "out"], "--source"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(source: Path, arguments: list[str], message: str) -> None:
    done = run(*(a.replace("{source}", str(source)) for a in arguments))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_large_data_sets_are_read_by_ray_with_the_same_result(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_det.data import headers, ray_map

    spec = importlib.util.spec_from_file_location("job_prepare", JOB)
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    monkeypatch.setattr(headers, "CHUNK_FILES", 2)
    monkeypatch.setattr(ray_map, "RAY_FROM", 6)
    monkeypatch.delattr(ray_map, "map_in_threads")
    manifest, report = make(str(source), None, job.map_chunks)
    expected, expected_report = make(str(source), None)
    assert (manifest.hash, report) == (expected.hash, expected_report)
