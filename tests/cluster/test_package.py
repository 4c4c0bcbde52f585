"""What is sent to a cluster, and what is refused before it is sent."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from tests.cluster.running import SUBMIT
from tests.ranks import ROOT

CANARY = "canary0123456789abcdef"


def package(folder: Path, to: Path) -> tuple[set[str], int]:
    """Names and bytes of what `ray job submit --working-dir FOLDER` sends."""
    create_package(str(folder), to, include_gitignore=True)
    with zipfile.ZipFile(to) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}, to.stat().st_size


def test_the_package_holds_the_code_and_is_small(tmp_path):
    names, size = package(ROOT, tmp_path / "package.zip")
    assert {"jobs/train.py", "ray_det/cli.py", "ray_det/recipes/quickstart.yaml", "ray_det/report/page.css"} <= names
    assert {name.split("/")[0] for name in names if not name.endswith(".yaml")} == {"jobs", "ray_det"}
    assert not [name for name in names if name.endswith(".pyc")]
    assert size < 5 << 20


def test_what_lies_around_is_not_sent(tmp_path):
    folder = tmp_path / "checkout"
    for name in (
        "ray_det/a.py",
        "jobs/train.py",
        "photos/1.jpg",
        "a",
        "evaluated/report.html",
        "notes.txt",
        "mine.yaml",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    for ignore in (".gitignore", ".rayignore"):
        (folder / ignore).write_text((ROOT / ignore).read_text())
    assert package(folder, tmp_path / "package.zip")[0] == {"ray_det/a.py", "jobs/train.py", "mine.yaml"}


@pytest.mark.parametrize(
    ("environment", "options", "named"),
    [
        (f"env_vars: {{WANDB_API_KEY: {CANARY}}}", [], "the text of 'WANDB_API_KEY'"),
        (f"working_dir: https://me:{CANARY}@host/code.zip", [], "the password in a URI"),
        ("{}", ["--storage", f"s3://me:{CANARY}@bucket/runs"], "--storage: the password in a URI"),
        ("{}", [f'--model.config={{"hf_token": "{CANARY}"}}'], "--model.config: the text of 'hf_token'"),
        ("{}", ["--wandb.api_key", CANARY], "--wandb.api_key: the text of '--wandb.api_key'"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(tmp_path, environment, options, named):
    file = tmp_path / "environment.yaml"
    file.write_text(environment)
    done = subprocess.run([SUBMIT, "--runtime-env", file, "train", *options], capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr, done.stderr
    assert CANARY not in done.stdout + done.stderr


def test_environments_that_come_with_it_pass():
    for file in (ROOT / "cluster" / "runtime_env").glob("*.yaml"):
        options = ["--name", "tokens", "--model.config", '{"pad_token_id": 1}', "--workers.num", "2..8"]
        check = [sys.executable, ROOT / "cluster" / "scripts" / "refuse_secrets.py", file, *options]
        assert subprocess.run(check, capture_output=True, text=True).returncode == 0
        assert "RAY_JOB_STOP_WAIT_TIME_S" in file.read_text()


def test_an_unknown_job_is_refused():
    done = subprocess.run([SUBMIT, "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no jobs/trian.py" in done.stderr
