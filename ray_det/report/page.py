"""`report.html`: one self-contained page about a run, from the files of its folder, whatever is there of them."""

from __future__ import annotations

import json
import math
import re
from html import escape
from pathlib import Path

import yaml

from ray_det.report.analysis_page import analysis_sections, read_analysis
from ray_det.report.charts import Chart, Series, render, running_median
from ray_det.report.classes import classes_section
from ray_det.report.markup import (
    BOXES,
    document,
    duration_of,
    finite,
    mapping,
    percent,
    picture,
    read,
    rounded,
    share,
    tile,
    whole,
)
from ray_det.report.metrics_file import Record, kind_of, read_records
from ray_det.report.progress import duration

MAX_PICTURES = 24


def write_page(folder: Path) -> Path:
    """Write `report.html` into a local run folder and return its path.

    Reads `config.yaml`, `metrics.jsonl`, `summary.json`, `analysis.json`, `pictures/*.jpg` and `worst_images/*.jpg`;
    each may be missing.

    Raises:
        OSError: the folder cannot be written.
    """
    config_text = read(folder / "config.yaml")
    config = mapping(yaml.safe_load, config_text)
    summary = mapping(json.loads, read(folder / "summary.json"))
    analysis = read_analysis(folder)
    records = list(read_records(folder / "metrics.jsonl"))
    steps = [r for r in records if kind_of(r) == "step"]
    epochs = [r for r in records if kind_of(r) == "epoch"]
    name = str(config.get("name") or folder.resolve().name)
    parts = [
        _header(name, config, summary, len(steps), len(epochs)),
        _tiles(summary, steps, epochs),
        _charts(config, summary, steps, epochs),
        analysis_sections(analysis, summary, folder),
        classes_section(summary or (epochs[-1] if epochs else {}), analysis),
        _pictures(folder / "pictures"),
        f"<details><summary>Configuration</summary><pre>{escape(config_text)}</pre></details>" if config_text else "",
    ]
    path = folder / "report.html"
    path.write_text(document(name, "\n".join(parts)), encoding="utf-8")
    return path


def _header(name: str, config: Record, summary: Record, steps: int, epochs: int) -> str:
    model = config.get("model") or {}
    data = config.get("data") or {}
    planned = (config.get("train") or {}).get("epochs")
    facts = [str(fact) for fact in (model.get("name"), data.get("train")) if fact]
    facts.append(f"{epochs}" + (f" of {planned}" if planned else "") + f" epochs, {whole(steps)} steps")
    if not summary:
        facts.append("not finished")
    return f"<header><h1>{escape(name)}</h1><p>{escape(' · '.join(facts))}</p></header>"


def _tiles(summary: Record, steps: list[Record], epochs: list[Record]) -> str:
    last = steps[-1] if steps else {}
    best = max(epochs, key=lambda r: finite(r.get("val/AP"), -1.0), default={})
    skipped = summary.get("skipped_steps", last.get("train/skipped_steps"))
    first_s = finite(summary.get("time_to_first_step_s"))
    first = f"first step after {duration(first_s)}" if math.isfinite(first_s) else ""
    tiles = [
        tile(f"{split.capitalize()} {metric}", share(summary.get(f"{split}/{metric}", best.get(f"{split}/{metric}"))))
        for split in ("val", "test")
        for metric in ("AP", "AP50")
    ]
    tiles += [
        tile("Best step", whole(summary.get("best_step", best.get("global_step"))), _of_steps(summary, last)),
        tile("Throughput", rounded(summary.get("images_per_s", last.get("train/images_per_s"))), unit="images/s"),
        tile("Wall time", duration_of(summary.get("wall_s")), first),
        tile("Padded pixels", percent(summary.get("padded_share", last.get("train/padded_share")))),
        tile("Waiting for data", percent(summary.get("data_wait_share", last.get("train/data_wait_share")))),
        tile("Skipped steps", whole(skipped), "loss or gradient not finite" if skipped else ""),
    ]
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _charts(config: Record, summary: Record, steps: list[Record], epochs: list[Record]) -> str:
    clip = finite((config.get("optim") or {}).get("clip_norm"), 0.0)
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


def _pictures(folder: Path) -> str:
    files = sorted(folder.glob("*.jpg"))[:MAX_PICTURES]
    if not files:
        return ""
    figures = []
    for file in files:
        named = re.fullmatch(r"step_(\d+)_\d+_image_(.+)", file.stem)
        figures.append(picture(file, f"image {named[2]}, step {int(named[1])}" if named else file.stem))
    return f'<h2>Predictions</h2>{BOXES}<section class="pictures">{"".join(figures)}</section>'


def _of_steps(summary: Record, last: Record) -> str:
    total = summary.get("global_step", last.get("global_step"))
    return f"of {whole(total)}" if total is not None else ""
