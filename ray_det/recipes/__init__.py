"""Recipes: YAML files that change some of the defaults. `--recipe NAME` reads `NAME.yaml` of this folder."""

from __future__ import annotations

from importlib import resources


def names() -> list[str]:
    """Every recipe's name, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in resources.files(__name__).iterdir() if f.name.endswith(".yaml"))


def text(name: str) -> str:
    """A recipe's YAML, comments and all; `name` is one of `names()`."""
    return resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
