"""`report.html`: one self-contained page about a run, from the files of its folder, whatever is there of them."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ray_det.report.charts import Chart, Series, render, running_median
from ray_det.report.metrics_file import Record, kind_of, read_records
from ray_det.report.progress import duration

MAX_PICTURES = 24
HERE = Path(__file__).parent


def write_page(folder: Path) -> Path:
    """Write `report.html` into a local run folder and return its path.

    Reads `config.yaml`, `metrics.jsonl`, `summary.json` and `pictures/*.jpg`; each may be missing.

    Raises:
        OSError: the folder cannot be written.
    """
    config_text = _text(folder / "config.yaml")
    config = _mapping(yaml.safe_load, config_text)
    summary = _mapping(json.loads, _text(folder / "summary.json"))
    records = list(read_records(folder / "metrics.jsonl"))
    steps = [r for r in records if kind_of(r) == "step"]
    epochs = [r for r in records if kind_of(r) == "epoch"]
    name = str(config.get("name") or folder.resolve().name)
    parts = [
        _header(name, config, summary, len(steps), len(epochs)),
        _tiles(summary, steps, epochs),
        _charts(config, summary, steps, epochs),
        _classes(summary, epochs),
        _pictures(folder / "pictures"),
        f"<details><summary>Configuration</summary><pre>{escape(config_text)}</pre></details>" if config_text else "",
    ]
    path = folder / "report.html"
    path.write_text(document(name, "\n".join(parts)), encoding="utf-8")
    return path


def document(name: str, body: str) -> str:
    """A page that needs nothing beside it."""
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
{(HERE / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _header(name: str, config: Record, summary: Record, steps: int, epochs: int) -> str:
    model = config.get("model") or {}
    data = config.get("data") or {}
    planned = (config.get("train") or {}).get("epochs")
    facts = [str(fact) for fact in (model.get("name"), data.get("train")) if fact]
    facts.append(f"{epochs}" + (f" of {planned}" if planned else "") + f" epochs, {_whole(steps)} steps")
    if not summary:
        facts.append("not finished")
    return f"<header><h1>{escape(name)}</h1><p>{escape(' · '.join(facts))}</p></header>"


def _tiles(summary: Record, steps: list[Record], epochs: list[Record]) -> str:
    last = steps[-1] if steps else {}
    best = max(epochs, key=lambda r: _number(r.get("val/AP"), -1.0), default={})
    skipped = summary.get("skipped_steps", last.get("train/skipped_steps"))
    first_s = _number(summary.get("time_to_first_step_s"))
    first = f"first step after {duration(first_s)}" if math.isfinite(first_s) else ""
    tiles = [
        _tile(f"{split.capitalize()} {metric}", _share(summary.get(f"{split}/{metric}", best.get(f"{split}/{metric}"))))
        for split in ("val", "test")
        for metric in ("AP", "AP50")
    ]
    tiles += [
        _tile("Best step", _whole(summary.get("best_step", best.get("global_step"))), _of_steps(summary, last)),
        _tile("Throughput", _round(summary.get("images_per_s", last.get("train/images_per_s"))), unit="images/s"),
        _tile("Wall time", _duration(summary.get("wall_s")), first),
        _tile("Padded pixels", _percent(summary.get("padded_share", last.get("train/padded_share")))),
        _tile("Waiting for data", _percent(summary.get("data_wait_share", last.get("train/data_wait_share")))),
        _tile("Skipped steps", _whole(skipped), "loss or gradient not finite" if skipped else ""),
    ]
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _tile(what: str, value: str, more: str = "", unit: str = "") -> str:
    unit = f"<small>{unit}</small>" if unit and value != "–" else ""
    return (
        f'<div class="tile"><div class="what">{escape(what)}</div>'
        f'<div class="value">{escape(value)}{unit}</div><div class="more">{escape(more)}</div></div>'
    )


def _charts(config: Record, summary: Record, steps: list[Record], epochs: list[Record]) -> str:
    clip = _number((config.get("optim") or {}).get("clip_norm"), 0.0)
    best_step = summary.get("best_step")
    best = next((float(i) for i, r in enumerate(epochs, start=1) if r["global_step"] == best_step), None)
    names = sorted({key for r in steps[:1] + steps[-1:] for key in r if key.startswith("train/loss_")})
    components = [_median(key.removeprefix("train/loss_"), steps, key, f"s{i % 7}") for i, key in enumerate(names)]
    charts = [
        Chart("Batch loss", "step", "loss", _with_median(steps, "train/batch_loss", "each batch"), scale="auto"),
        Chart(
            "Validation AP by epoch",
            "epoch",
            "AP",
            [_by_epoch("AP", epochs, "val/AP", "s0"), _by_epoch("AP50", epochs, "val/AP50", "s1")],
            x_line=(best, "best") if best else None,
        ),
        Chart(
            "Gradient norm before clipping",
            "step",
            "norm",
            _with_median(steps, "train/grad_norm", "each step"),
            scale="log",
            y_line=(clip, f"clipped at {clip:g}") if clip else None,
        ),
        Chart(
            "Loss by epoch",
            "epoch",
            "loss",
            [_by_epoch("train", epochs, "train/epoch_avg_loss", "s0"), _by_epoch("val", epochs, "val/loss", "s1")],
            scale="auto",
        ),
        Chart("Learning rate", "step", "learning rate", [_series("learning rate", steps, "train/learning_rate", "s0")]),
    ]
    if components:
        charts.append(Chart("Loss components, running medians", "step", "loss", components, scale="auto"))
    return f'<h2>Training</h2><section class="charts">{"".join(map(render, charts))}</section>'


def _series(name: str, steps: list[Record], key: str, style: str) -> Series:
    found = [r for r in steps if key in r]
    return Series(name, [r["global_step"] for r in found], [r[key] for r in found], style)


def _median(name: str, steps: list[Record], key: str, style: str) -> Series:
    points = running_median(_series(name, steps, key, style).finite())
    return Series(name, [x for x, _ in points], [y for _, y in points], style)


def _with_median(steps: list[Record], key: str, name: str) -> list[Series]:
    return [_series(name, steps, key, "raw"), _median("running median", steps, key, "s0")]


def _by_epoch(name: str, epochs: list[Record], key: str, style: str) -> Series:
    return Series(name, list(range(1, len(epochs) + 1)), [r.get(key) for r in epochs], style)


def _classes(summary: Record, epochs: list[Record]) -> str:
    source = summary or (epochs[-1] if epochs else {})
    found = {split: _per_class(source, split) for split in ("val", "test")}
    splits = [split for split in found if found[split]]
    if not splits:
        return ""
    names = list(dict.fromkeys(name for split in splits for name in found[split]))
    names.sort(key=lambda n: -_number(found[splits[0]].get(n), -1.0))
    head = "".join(f"<th>{split} AP</th>" for split in splits)
    rows = []
    for name in names:
        values = [found[split].get(name) for split in splits]
        cells = "".join(f"<td>{_share(value)}</td>" for value in values)
        widths = (min(max(_number(value, 0.0), 0.0), 1.0) * 100 for value in values)
        bars = "".join(f'<div style="width:{width:.1f}%"></div>' for width in widths)
        rows.append(f'<tr><td>{escape(name)}</td>{cells}<td class="bar">{bars}</td></tr>')
    return (
        f'<h2>Classes</h2><div class="table"><table><thead><tr><th>class</th>{head}<th></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _per_class(source: Record, split: str) -> dict[str, Any]:
    prefix = f"{split}/AP/"
    return {key.removeprefix(prefix): value for key, value in source.items() if key.startswith(prefix)}


def _pictures(folder: Path) -> str:
    files = sorted(folder.glob("*.jpg"))[:MAX_PICTURES]
    if not files:
        return ""
    figures = []
    for file in files:
        named = re.fullmatch(r"step_(\d+)_\d+_image_(.+)", file.stem)
        caption = f"image {named[2]}, step {int(named[1])}" if named else file.stem
        source = base64.b64encode(file.read_bytes()).decode()
        figures.append(
            f'<figure class="picture"><img alt="{escape(caption)}" src="data:image/jpeg;base64,{source}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    legend = '<p class="boxes"><i class="true"></i>true<i class="found"></i>predicted, with score</p>'
    return f'<h2>Predictions</h2>{legend}<section class="pictures">{"".join(figures)}</section>'


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _mapping(parse: Any, text: str) -> Record:
    """The file's content; empty where it is missing or cut short, for a report must not fail for that."""
    try:
        value = parse(text) if text else {}
    except (ValueError, yaml.YAMLError):
        return {}
    return dict(value) if isinstance(value, Mapping) else {}


def _number(value: Any, default: float = math.nan) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else default


def _share(value: Any) -> str:
    """An AP; COCO's -1 says that there was nothing to find."""
    return f"{value:.3f}" if _number(value, -1.0) >= 0 else "–"


def _percent(value: Any) -> str:
    return f"{value * 100:.1f} %" if math.isfinite(_number(value)) else "–"


def _round(value: Any) -> str:
    return f"{value:.3g}" if _number(value, 1e3) < 1e3 else _whole(value)


def _whole(value: Any) -> str:
    return f"{round(value):,}".replace(",", " ") if math.isfinite(_number(value)) else "–"


def _duration(value: Any) -> str:
    return duration(value) if math.isfinite(_number(value)) else "–"


def _of_steps(summary: Record, last: Record) -> str:
    total = summary.get("global_step", last.get("global_step"))
    return f"of {_whole(total)}" if total is not None else ""
