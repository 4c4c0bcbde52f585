"""Pieces that the report's pages are made of: the document, tiles, pictures, and numbers as texts."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ray_det.report.metrics_file import Record
from ray_det.report.progress import duration

HERE = Path(__file__).parent
BOXES = '<p class="boxes"><i class="true"></i>true<i class="found"></i>predicted, with score</p>'
"""What is what in pictures."""


def document(name: str, body: str, script: Path = HERE / "page.js") -> str:
    """A page that fetches nothing; `body` is HTML, `script` a file."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)} – ray_det</title>
<style>
{(HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{body}
</main>
<script>
{script.read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def tile(what: str, value: str, more: str = "", unit: str = "") -> str:
    unit = f"<small>{unit}</small>" if unit and value != "–" else ""
    return (
        f'<div class="tile"><div class="what">{escape(what)}</div>'
        f'<div class="value">{escape(value)}{unit}</div><div class="more">{escape(more)}</div></div>'
    )


def picture(path: Path, caption: str) -> str:
    """A JPEG file, embedded."""
    source = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure class="picture"><img alt="{escape(caption)}" src="data:image/jpeg;base64,{source}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def read(path: Path) -> str:
    """A text file; empty where there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def mapping(parse: Any, text: str) -> Record:
    """The file's content; empty where it is missing or cut short, for a report must not fail for that."""
    try:
        value = parse(text) if text else {}
    except (ValueError, yaml.YAMLError):
        return {}
    return dict(value) if isinstance(value, Mapping) else {}


def finite(value: Any, default: float = math.nan) -> float:
    """`default` for what is no number, or not finite."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else default


def share(value: Any) -> str:
    """An AP; COCO's -1 says that there was nothing to find."""
    return f"{value:.3f}" if finite(value, -1.0) >= 0 else "–"


def percent(value: Any) -> str:
    return f"{value * 100:.1f} %" if math.isfinite(finite(value)) else "–"


def rounded(value: Any) -> str:
    return f"{value:.3g}" if finite(value, 1e3) < 1e3 else whole(value)


def whole(value: Any) -> str:
    return f"{round(value):,}".replace(",", " ") if math.isfinite(finite(value)) else "–"


def duration_of(value: Any) -> str:
    return duration(value) if math.isfinite(finite(value)) else "–"
