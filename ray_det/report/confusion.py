"""A confusion matrix as a heat map, and its most frequent confusions as a table.

Rows are true classes and columns found ones, as in Ultralytics and scikit-learn turned to rows. The last column holds
objects that were missed, the last row detections for which no object was left: where there is none, or where it went to
a better score, of whatever class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

SHOWN = 100  # classes in the heat map at most
LISTED = 10  # confusions in the table
WIDTH = 820  # pixels of all cells at most
LARGEST, NUMBERED = 56.0, 30.0  # pixels of a cell at most, and from which on it holds its number
LABEL = 132  # pixels for the names of the classes
LONGEST = 20  # characters of a name
NONE_LEFT, MISSED = "no object left", "missed"  # names of the last row and column


class Confusion(NamedTuple):
    true: str
    found: str
    objects: int
    share: float  # of the objects of the true class


def confusion_figure(names: Sequence[str], cells: Sequence[Sequence[int]]) -> str:
    """A `<figure>` with the matrix.

    Args:
        cells: (true, found, count) where count is not 0; `len(names)` is what has no partner.
    """
    matrix = np.zeros((len(names) + 1, len(names) + 1), np.int64)
    for true, found, count in cells:
        matrix[true, found] = count
    shown = _shown(matrix)
    side = min(LARGEST, WIDTH / len(shown))
    wide = " wide" if side < NUMBERED else ""
    notes = ["rows: true, columns: found as"]
    if len(shown) <= len(names):
        why = "with the most errors" if len(shown) > SHOWN else "that are there or found"
        notes.append(f"the {len(shown) - 1} of {len(names)} classes {why}")
    return (
        f'<figure class="chart matrix{wide}"><figcaption><h3>Confusion matrix</h3><span class="legend">'
        f"{'; '.join(notes)}</span></figcaption>{_svg(names, matrix, shown, side)}</figure>"
    )


def most_confused(names: Sequence[str], cells: Sequence[Sequence[int]]) -> list[Confusion]:
    """Objects that were found as another class, the most frequent pairs of classes first."""
    totals = np.zeros(len(names) + 1, np.int64)
    for true, _, count in cells:
        totals[true] += count
    mixed = sorted((cell for cell in cells if cell[0] != cell[1] and max(cell[:2]) < len(names)), key=lambda c: -c[2])
    return [Confusion(names[t], names[f], count, float(count / totals[t])) for t, f, count in mixed[:LISTED]]


def _shown(matrix: np.ndarray) -> list[int]:
    """Indices of classes that occur, in their order, and of what has no partner."""
    last = len(matrix) - 1
    counts = matrix.sum(axis=0) + matrix.sum(axis=1)
    errors = (counts - 2 * np.diag(matrix))[:last]
    picked = np.lexsort((-errors, counts[:last] == 0))[: min(SHOWN, np.count_nonzero(counts[:last]))]
    return [*sorted(picked.tolist()), last]


def _svg(names: Sequence[str], matrix: np.ndarray, shown: list[int], side: float) -> str:
    rows, columns = [*names, NONE_LEFT], [*names, MISSED]
    label = min(LABEL, 12 + 6.6 * max(min(len(rows[i]), LONGEST) for i in shown))
    size = label + side * len(shown)
    font = max(6.5, min(12.0, side * 0.85))
    parts = list(_labels([(rows[i], columns[i]) for i in shown], label, side, size))
    for row, true in enumerate(shown):
        total = matrix[true].sum()
        for column, found in enumerate(shown):
            if matrix[true, found]:
                x, y = label + column * side, label + row * side
                parts.append(_cell(x, y, side, names, true, found, int(matrix[true, found]), int(total)))
    return (
        f'<svg viewBox="0 0 {size:.0f} {size:.0f}" style="max-width:{size:.0f}px;font-size:{font:.1f}px" role="img" '
        f'aria-label="Confusion matrix, rows are true classes, columns found ones">{"".join(parts)}</svg>'
    )


def _labels(names: Sequence[tuple[str, str]], label: float, side: float, size: float) -> Iterator[str]:
    """Lines of the grid, names of rows at the left and of columns at the top."""
    for i, pair in enumerate(names):
        at = label + i * side
        row, column = (escape(name if len(name) <= LONGEST else name[: LONGEST - 1] + "…") for name in pair)
        middle = at + side / 2
        yield f'<path class="grid" d="M{label:.1f} {at:.1f}H{size:.1f}M{at:.1f} {label:.1f}V{size:.1f}"/>'
        yield f'<text x="{label - 6:.1f}" y="{middle:.1f}" text-anchor="end" dy=".35em">{row}</text>'
        yield f'<text transform="translate({middle:.1f} {label - 6:.1f}) rotate(-90)" dy=".35em">{column}</text>'
    yield f'<path class="grid" d="M{label:.1f} {size:.1f}H{size:.1f}V{label:.1f}"/>'


def _cell(x: float, y: float, side: float, names: Sequence[str], true: int, found: int, count: int, total: int) -> str:
    """Shaded by the root of its share of the row, so that few confusions are seen too."""
    depth = math.sqrt(count / total)
    style = "s0" if true == found else "s1"
    hint = f"{_sentence(names, true, found)}: {count} of {total} ({count / total:.1%})"
    cell = (
        f'<rect class="cell {style}" x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" '
        f'fill-opacity="{depth:.2f}"><title>{escape(hint)}</title></rect>'
    )
    if side < NUMBERED:
        return cell
    shade = "over" if depth > 0.65 else "on"
    text = f"{count / 1000:.3g}k" if count >= 10_000 else str(count)
    return cell + f'<text class="{shade}" x="{x + side / 2:.1f}" y="{y + side / 2:.1f}" dy=".35em">{text}</text>'


def _sentence(names: Sequence[str], true: int, found: int) -> str:
    last = len(names)
    if true == last:
        return f"{NONE_LEFT}, found as {names[found]}"
    return f"{names[true]} {MISSED}" if found == last else f"{names[true]} found as {names[found]}"
