"""Small line charts as inline SVG: axes with round ticks, several series, a legend, data for a hover script."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 42
MAX_POINTS = 800  # drawn per series
LOG_FROM = 12.0  # largest / smallest value from which an "auto" axis is logarithmic
SMALLEST_SHARE = 1e-4  # of the largest value; on a log axis what is smaller lies on the lower edge

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line. `style` is a CSS class of the page (s0..s6 are colours); y may hold None where nothing was measured."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    style: str = "s0"

    def finite(self) -> list[Point]:
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if y is not None and math.isfinite(y)]


@dataclass(frozen=True)
class Chart:
    """What a chart shows; see `render`."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    scale: str = "linear"  # linear, log or auto
    y_line: tuple[float, str] | None = None  # a level to compare with
    x_line: tuple[float, str] | None = None
    whole_x: bool = True  # ticks at whole numbers only
    y_to: float | None = None  # a value that the y axis reaches


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    start: float  # pixel of `low`
    end: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def pixel(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def render(chart: Chart) -> str:
    """A `<figure>`; a note in place of the drawing where there is nothing to draw."""
    lines = [(series, thinned(series.finite())) for series in chart.series]
    lines = [(series, points) for series, points in lines if points]
    head = f"<figcaption><h3>{escape(chart.title)}</h3>{_legend([s for s, _ in lines])}</figcaption>"
    if not lines:
        return f'<figure class="chart">{head}<p class="empty">nothing recorded</p></figure>'
    x, y = _axes(chart, [points for _, points in lines])
    data = dict(
        x=[x.low, x.high, x.start, x.end],
        y=[y.low, y.high, y.start, y.end],
        log=y.log,
        label=chart.x_label,
        series=[dict(name=s.name, style=s.style, points=[[_short(a), _short(b)] for a, b in p]) for s, p in lines],
    )
    body = _grid(chart, x, y) + "".join(_line(s, p, x, y) for s, p in lines) + _guides(chart, x, y)
    return (
        f'<figure class="chart">{head}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(chart.title)}" data-chart="{escape(json.dumps(data))}">{body}</svg></figure>'
    )


def thinned(points: list[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= limit:
        return points
    kept = points[:1]
    for part in np.array_split(np.arange(1, len(points) - 1), limit // 2):
        ys = [points[i][1] for i in part]
        for i in sorted({int(part[0]) + ys.index(min(ys)), int(part[0]) + ys.index(max(ys))}):
            kept.append(points[i])
    return [*kept, points[-1]]


def running_median(points: list[Point], count: int = 200) -> list[Point]:
    """Medians over windows of a 20th of the points (9 at least) around `count` places."""
    if not points:
        return []
    ys = np.array([y for _, y in points])
    half = max(len(points) // 40, 4)
    places = np.unique(np.linspace(0, len(points) - 1, count).astype(int))
    return [(points[i][0], float(np.median(ys[max(i - half, 0) : i + half + 1]))) for i in places]


def round_ticks(low: float, high: float, count: int = 6, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], with 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    every = max(1, len(powers) // 7)
    ticks = [m * 10.0**p for p in list(powers)[::every] for m in factors]
    return [t for t in ticks if low * 0.999 <= t <= high * 1.001]


def number(value: float) -> str:
    """A tick's text: 20k, 0.05, 1e-6."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:g}"


def _axes(chart: Chart, lines: list[list[Point]]) -> tuple[Axis, Axis]:
    xs = [x for points in lines for x, _ in points]
    ys = [y for points in lines for _, y in points]
    if chart.y_to is not None:
        ys.append(chart.y_to)
    if chart.y_line and max(ys) * 20 > chart.y_line[0]:
        ys.append(chart.y_line[0])
    x_low, x_high = min(xs), max(xs)
    x_ticks = round_ticks(x_low, x_high, whole=chart.whole_x) if x_high > x_low else [x_low]
    if x_high == x_low:
        x_low, x_high = x_low - 1, x_high + 1
    positive = [y for y in ys if y > 0]
    log = bool(positive) and (
        chart.scale == "log" or (chart.scale == "auto" and min(ys) > 0 and max(ys) / min(ys) >= LOG_FROM)
    )
    if log:
        high = max(positive)
        low = max(min(positive), high * SMALLEST_SHARE)
        low, high = low / 1.15, high * 1.15
        ticks = log_ticks(low, high)
    else:
        low, high = min(*ys, 0.0), max(ys)
        high = high + (high - low) * 0.06 if high > low else low + 1
        ticks = round_ticks(low, high)
    x = Axis(x_low, x_high, LEFT, WIDTH - RIGHT, ticks=x_ticks)
    return x, Axis(low, high, HEIGHT - BOTTOM, TOP, log, ticks)


def _grid(chart: Chart, x: Axis, y: Axis) -> str:
    parts = []
    for tick in y.ticks:
        at = y.pixel(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    floor = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    for tick in x.ticks:
        at = x.pixel(tick)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{floor + 16}" text-anchor="middle">{number(tick)}</text>')
    middle = (TOP + floor) / 2
    label = escape(chart.y_label + (" (log)" if y.log else ""))
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 7}">{escape(chart.x_label)}</text>'
    )
    parts.append(f'<text class="label" transform="translate(13 {middle}) rotate(-90)">{label}</text>')
    return "".join(parts)


def _guides(chart: Chart, x: Axis, y: Axis) -> str:
    parts = []
    if chart.y_line and y.low <= chart.y_line[0] <= y.high:
        at = y.pixel(chart.y_line[0])
        parts.append(f'<line class="guide" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        text = escape(chart.y_line[1])
        parts.append(f'<text class="note" x="{WIDTH - RIGHT - 4}" y="{at - 5:.1f}" text-anchor="end">{text}</text>')
    if chart.x_line and x.low <= chart.x_line[0] <= x.high:
        at = x.pixel(chart.x_line[0])
        anchor, side = ("end", -5) if at > WIDTH * 0.8 else ("start", 5)
        parts.append(f'<line class="guide" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        text = escape(chart.x_line[1])
        parts.append(
            f'<text class="note" x="{at + side:.1f}" y="{HEIGHT - BOTTOM - 6}" text-anchor="{anchor}">{text}</text>'
        )
    return "".join(parts)


def _line(series: Series, points: list[Point], x: Axis, y: Axis) -> str:
    pixels = [(x.pixel(a), y.pixel(b)) for a, b in points]
    path = f'<polyline class="line {series.style}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in pixels)}"/>'
    if len(pixels) > 40:
        return path
    return path + "".join(f'<circle class="dot {series.style}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in pixels)


def _legend(series: list[Series]) -> str:
    if len(series) < 2:
        return ""
    keys = (f'<span class="key"><i class="{s.style}"></i>{escape(s.name)}</span>' for s in series)
    return f'<span class="legend">{"".join(keys)}</span>'


def _short(value: float) -> float:
    return float(f"{value:.6g}")
