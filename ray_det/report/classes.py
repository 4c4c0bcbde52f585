"""The table of classes: AP, and what an analysis knows of each."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from ray_det.report.markup import finite, share, whole
from ray_det.report.metrics_file import Record


def classes_section(metrics: Record, analysis: Record) -> str:
    """Empty where there are no numbers.

    Args:
        metrics: has `val/AP/<class>` or `test/AP/<class>`.
        analysis: of `analysis.json`; may be empty.
    """
    found = {split: _per_class(metrics, split) for split in ("val", "test")}
    splits = [split for split in found if found[split]]
    if not splits:
        return ""
    names = list(dict.fromkeys(name for split in splits for name in found[split]))
    names.sort(key=lambda name: -finite(found[splits[0]].get(name), -1.0))
    heads, more = _analysed(analysis)
    rows = []
    for name in names:
        values = [found[split].get(name) for split in splits]
        cells = "".join(f"<td>{cell}</td>" for cell in [*map(share, values), *more.get(name, ["–"] * len(heads))])
        widths = (min(max(finite(value, 0.0), 0.0), 1.0) * 100 for value in values)
        bars = "".join(f'<div style="width:{width:.1f}%"></div>' for width in widths)
        rows.append(f'<tr><td>{escape(name)}</td>{cells}<td class="bar">{bars}</td></tr>')
    titles = "".join(f"<th>{title}</th>" for title in [*(f"{split} AP" for split in splits), *heads])
    return (
        f'<h2>Classes</h2><div class="table"><table><thead><tr><th>class</th>{titles}<th></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def ap50_of(curve: list[float] | None) -> float:
    """The mean of a precision-recall curve of `analysis.json`; -1 for a class without objects."""
    return float(np.mean(curve)) if curve else -1.0


def _per_class(metrics: Record, split: str) -> dict[str, Any]:
    prefix = f"{split}/AP/"
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


def _analysed(analysis: Record) -> tuple[list[str], dict[str, list[str]]]:
    """(heads of columns, cells by class); both empty without an analysis."""
    if not analysis:
        return [], {}
    rows = zip(analysis["objects"], analysis["precision"], analysis["f1"]["best"]["classes"], strict=True)
    cells = [
        [whole(objects), share(ap50_of(curve)), *(share((best or {}).get(key)) for key in ("f1", "threshold"))]
        for objects, curve, best in rows
    ]
    heads = [f"{analysis['split']} {what}" for what in ("objects", "AP50", "best F1")]
    return [*heads, "at score"], dict(zip(analysis["classes"], cells, strict=True))
