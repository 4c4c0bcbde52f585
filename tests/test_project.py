"""The project itself: the README's commands, what CI runs, the direction of imports, and what files may say."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def readme_commands() -> list[str]:
    """The lines of the README's fenced blocks that set a fresh machine up."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.startswith("pip install uv && ")]


def committed_files() -> list[str]:
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name]


def committed_text() -> dict[str, str]:
    files: dict[str, str] = {}
    for name in committed_files():
        try:
            files[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # a picture, or deleted and not yet committed
            continue
    return files


def run_ci(tmp_path: Path, *, with_uv: bool, **env: str) -> list[str]:
    """What `.ci/run` calls, by programs of the same names that only write down their arguments."""
    bin_, log = tmp_path / "bin", tmp_path / "log"
    bin_.mkdir()
    env_seen = "real=$RAY_DET_REAL_DATA no_pyc=$PYTHONDONTWRITEBYTECODE"
    (tmp_path / "uv").write_text(f'#!/bin/sh\necho "uv $*" >> {log}\necho "{env_seen}" >> {log}.env\n')
    (tmp_path / "uv").chmod(0o755)
    pip = f'#!/bin/sh\necho "pip $*" >> {log}\n/bin/cp -p {tmp_path}/uv {bin_}/uv\n'
    (bin_ / "pip").write_text(pip)
    (bin_ / "pip").chmod(0o755)
    if with_uv:
        (bin_ / "uv").symlink_to(tmp_path / "uv")
    (bin_ / "dirname").symlink_to(shutil.which("dirname") or "/usr/bin/dirname")
    subprocess.run(["/bin/bash", ROOT / ".ci/run"], check=True, cwd=tmp_path, env={"PATH": str(bin_), **env})
    return log.read_text().splitlines()


def test_the_readme_has_one_command_to_run_and_one_to_test() -> None:
    run, test = readme_commands()
    assert run == "pip install uv && uv run jobs/train.py"
    assert test == "pip install uv && uv run pytest -n 2"


def test_ci_runs_the_readmes_test_command(tmp_path: Path) -> None:
    calls = run_ci(tmp_path, with_uv=False)
    assert " && ".join([calls[0], calls[-1]]) == readme_commands()[1]
    assert calls[1:-1] == ["uv run ruff check", "uv run ruff format --check", "uv run pyright", "uv run lint-imports"]


def test_ci_keeps_bytecode_and_the_real_data_it_was_given(tmp_path: Path) -> None:
    calls = run_ci(tmp_path, with_uv=True, PYTHONDONTWRITEBYTECODE="1", RAY_DET_REAL_DATA="given")
    assert calls[0] == "uv run ruff check"
    assert set((tmp_path / "log.env").read_text().splitlines()) == {"real=given no_pyc="}


def test_jobs_do_not_shadow_packages() -> None:
    """`python jobs/x.py` puts jobs/ first on the path: a job named like a package would be imported in its place."""
    stems = [file.stem for file in (ROOT / "jobs").glob("*.py")]
    assert "train" in stems
    assert [stem for stem in stems if importlib.util.find_spec(stem)] == []


def test_imports_point_one_way() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_loaders_import_no_torch() -> None:
    """Ray starts many loader processes: torch would cost each of them seconds and hundreds of MB."""
    code = """
import importlib, pkgutil, sys
import ray_det.data
for module in pkgutil.walk_packages(ray_det.data.__path__, "ray_det.data."):
    importlib.import_module(module.name)
    assert "torch" not in sys.modules, f"{module.name} imports torch"
    print(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ray_det.data.plan" in done.stdout


def test_committed_text_names_no_machine() -> None:
    home = re.compile(r"(?<![\w.~-])/(?:home/(?!ray\b)|root/|Users/)\w[^\s'\"]*")  # Ray's images live in their own home
    registry = re.compile(r"(?:index-url|registry\s*=|(?:pypi|npm|artifactory|nexus)[\w.-]*\.[a-z]+/)[^\s'\"]*")
    found = [
        f"{name}: {hit[0]}"
        for name, text in committed_text().items()
        if name != "tests/test_project.py"
        for pattern in (home, registry, re.compile(re.escape(f"{ROOT}/")))
        for hit in pattern.finditer(text)
    ]
    assert found == []


def test_links_lead_somewhere() -> None:
    """Pages and pictures that the documentation names are committed with it."""
    files = committed_files()
    folders = {str(parent) for name in files for parent in Path(name).parents}
    links = [
        (name, os.path.normpath(Path(name).parent / link))
        for name, text in committed_text().items()
        if name.endswith(".md")
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        if "://" not in link
    ]
    assert ("README.md", "docs/recipe.md") in links
    assert [link for link in links if link[1] not in folders.union(files)] == []


def test_files_stay_small() -> None:
    """One idea per file: about 250 lines, and never above 300."""
    sizes = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in (ROOT / "ray_det").rglob("*.py")}
    assert {str(path): lines for path, lines in sizes.items() if lines > 300} == {}


def test_recipes_and_readme_agree() -> None:
    """The README's table of recipes holds the numbers that the recipes give."""
    from ray_det import cli
    from ray_det.config import TrainJobConfig

    rows = re.findall(r"^\| `([\w.]+)` \|((?:[^|\n]*\|){3}[^|\n]*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    table = {key: [cell.strip().strip("`") for cell in cells.split("|")] for key, cells in rows}
    assert len(table) >= 8
    for column, name in enumerate(("quickstart", "finetune", "from_imagenet", "baseline")):
        config = cli.parse(TrainJobConfig, ["--recipe", name], description="", recipes=True)[0].model_dump()
        for key, cells in table.items():
            section, field = key.split(".")
            value = config[section][field]
            assert type(value)(cells[column]) == value, f"{key} of {name}"
