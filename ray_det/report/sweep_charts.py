"""The charts of a sweep's page as inline SVG: curves, two parameters against AP, all of them in parallel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ray_det.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, log_ticks, number, round_ticks
from ray_det.report.sweep_trial import SweepTrial

MARGIN = 0.05  # of an axis, beside its lowest and its highest value
FLOOR = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Parameter:
    """What a sweep has searched. Values that are no numbers lie on an axis by their place among the choices."""

    name: str
    log: bool
    choices: tuple[Any, ...] | None = None  # where not all values are numbers

    @classmethod
    def of(cls, name: str, trials: Sequence[SweepTrial], *, log: bool) -> Parameter:
        values = [trial.params[name] for trial in trials if name in trial.params]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            return cls(name, log)
        return cls(name, False, tuple(sorted({*map(str, values)})))

    def at(self, trial: SweepTrial) -> float:
        value = trial.params[self.name]
        return float(self.choices.index(str(value)) if self.choices else value)

    def text(self, value: float) -> str:
        return self.choices[round(value)] if self.choices else number(value)

    def axis(self, trials: Sequence[SweepTrial], start: float, end: float) -> Axis:
        values = [self.at(trial) for trial in trials]
        axis = spanned(values, start, end, log=self.log)
        if not self.choices:
            return axis
        return Axis(axis.low, axis.high, start, end, ticks=[float(i) for i in range(len(self.choices))])


def evaluated(parameters: Sequence[Parameter], trials: Sequence[SweepTrial]) -> list[SweepTrial]:
    """Those with a val/AP that have all of these parameters: a sweep may have gone on in another space."""
    names = {parameter.name for parameter in parameters}
    return [trial for trial in trials if trial.best_ap is not None and names <= trial.params.keys()]


def spanned(values: Sequence[float], start: float, end: float, *, log: bool = False) -> Axis:
    """An axis that holds the values, with round ticks."""
    low, high = min(values), max(values)
    if log:
        more = (high / low) ** MARGIN if high > low else 2.0
        low, high = low / more, high * more
        return Axis(low, high, start, end, True, log_ticks(low, high))
    more = (high - low) * MARGIN if high > low else max(abs(low), 1.0) * MARGIN
    low, high = low - more, high + more
    return Axis(low, high, start, end, ticks=round_ticks(low, high))


def curves(trials: Sequence[SweepTrial], best: SweepTrial | None) -> str:
    """val/AP by epoch; a cross where the scheduler stopped a trial, a circle at the end of one that went through."""
    drawn = [trial for trial in trials if trial.curve]
    if not drawn:
        return _figure("Learning curves", "")
    epochs = [float(epoch) for trial in drawn for epoch, _ in trial.curve]
    first, last = min(epochs), max(epochs)
    if last > first:
        x = Axis(first, last, LEFT, WIDTH - RIGHT - 8, ticks=round_ticks(first, last, whole=True))
    else:
        x = Axis(first - 1, first + 1, LEFT, WIDTH - RIGHT - 8, ticks=[first])
    y = spanned([0.0, *(ap for trial in drawn for _, ap in trial.curve)], FLOOR, TOP)
    body = _frame(x, y, "epoch", "val/AP")
    for trial in sorted(drawn, key=lambda trial: (trial is best, trial.state == "finished")):
        style = "s1 best" if trial is best else "s0" if trial.state == "finished" else "raw"
        points = [(x.pixel(epoch), y.pixel(ap)) for epoch, ap in trial.curve]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        body += f'<g class="trial">{_title(trial)}<polyline class="line {style}" points="{line}"/>'
        body += _end(*points[-1], trial, style) + "</g>"
    keys = (("s1", "best"), ("s0", "to the end"), ("raw", "stopped (✕), failed or interrupted"))
    return _figure("Learning curves", body, keys)


def plane(x_of: Parameter, y_of: Parameter, trials: Sequence[SweepTrial], best: SweepTrial | None) -> str:
    """Two parameters, each trial a disc with its number, coloured by its best val/AP."""
    drawn = evaluated((x_of, y_of), trials)
    title = f"{x_of.name} × {y_of.name}"
    if not drawn:
        return _figure(title, "")
    x, y = x_of.axis(drawn, LEFT, WIDTH - RIGHT), y_of.axis(drawn, FLOOR, TOP)
    body = _frame(x, y, _log_label(x_of), _log_label(y_of), x_of.text, y_of.text)
    for trial in drawn:
        a, b = x.pixel(x_of.at(trial)), y.pixel(y_of.at(trial))
        size = 11 if trial is best else 8
        disc = f'<circle class="disc" cx="{a:.1f}" cy="{b:.1f}" r="{size}" style="fill:{_colour(trial, drawn)}"/>'
        text = f'<text class="inside" x="{a:.1f}" y="{b + 3.5:.1f}">{trial.number}</text>'
        body += f'<g class="trial">{_title(trial)}{disc}{text}</g>'
    return _figure(title, body, _scale_of(drawn))


def parallel(parameters: Sequence[Parameter], trials: Sequence[SweepTrial], best: SweepTrial | None) -> str:
    """Parallel coordinates: an axis for each parameter and one for val/AP, a line for each trial."""
    drawn = evaluated(parameters, trials)
    if not drawn:
        return _figure("All parameters", "")
    bottom, top = FLOOR + 14, TOP + 18
    axes = [(p.name, p.axis(drawn, bottom, top), p.at, p.text) for p in parameters]
    result = spanned([trial.best_ap or 0.0 for trial in drawn], bottom, top)
    axes.append(("val/AP", result, lambda trial: trial.best_ap or 0.0, number))
    places = [LEFT + 12 + i * (WIDTH - LEFT - RIGHT - 52) / (len(axes) - 1) for i in range(len(axes))]
    body = ""
    for trial in sorted(drawn, key=lambda trial: (trial is best, trial.best_ap)):
        points = [f"{p:.1f},{axis.pixel(at(trial)):.1f}" for p, (_, axis, at, _) in zip(places, axes, strict=True)]
        style = f'class="line{" best" if trial is best else ""}" style="stroke:{_colour(trial, drawn)}"'
        body += f'<g class="trial">{_title(trial)}<polyline {style} points="{" ".join(points)}"/></g>'
    for place, (name, axis, _, text) in zip(places, axes, strict=True):
        body += f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{bottom}"/>'
        body += f'<text class="label" x="{place:.1f}" y="{TOP + 4}">{escape(name.rpartition(".")[2])}</text>'
        for tick in axis.ticks:
            at = axis.pixel(tick)
            body += f'<line class="axis" x1="{place - 3:.1f}" x2="{place:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
            words = escape(text(tick))
            body += f'<text class="tick" x="{place - 6:.1f}" y="{at + 3.5:.1f}" text-anchor="end">{words}</text>'
    return _figure("All parameters", body, _scale_of(drawn))


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, x_text: Any = number, y_text: Any = number) -> str:
    """Grid, ticks and labels; either axis may be logarithmic."""
    parts = []
    for tick in y.ticks:
        at = y.pixel(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        words = escape(y_text(tick))
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{words}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{FLOOR}" y2="{FLOOR}"/>')
    for tick in x.ticks:
        at = x.pixel(tick)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{FLOOR}" y2="{FLOOR + 4}"/>')
        words = escape(x_text(tick))
        parts.append(f'<text class="tick" x="{at:.1f}" y="{FLOOR + 16}" text-anchor="middle">{words}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 7}">{escape(x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(13 {(TOP + FLOOR) / 2}) rotate(-90)">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _end(x: float, y: float, trial: SweepTrial, style: str) -> str:
    if trial.state == "finished":
        return f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
    path = f"M{x - 4:.1f},{y - 4:.1f} l8,8 m0,-8 l-8,8"
    return f'<path class="cross {style}" d="{path}"/>' if trial.state == "stopped" else ""


def _title(trial: SweepTrial) -> str:
    """What a browser shows over it."""
    values = [f"{name} {value}" for name, value in trial.params.items()]
    ap = "" if trial.best_ap is None else f"val/AP {trial.best_ap:.4f}"
    lines = [trial.name, *values, ap, f"{trial.state}, {trial.epochs} epochs"]
    return f"<title>{escape(chr(10).join(filter(None, lines)))}</title>"


def _colour(trial: SweepTrial, drawn: Sequence[SweepTrial]) -> str:
    """From the lowest AP's to the highest's."""
    aps = [other.best_ap or 0.0 for other in drawn]
    low, high = min(aps), max(aps)
    share = ((trial.best_ap or 0.0) - low) / (high - low) if high > low and math.isfinite(high - low) else 1.0
    return f"color-mix(in oklab, var(--s1) {share * 100:.0f}%, var(--raw))"


def _scale_of(drawn: Sequence[SweepTrial]) -> tuple[tuple[str, str], ...]:
    aps = [trial.best_ap or 0.0 for trial in drawn]
    return (("raw", f"val/AP {min(aps):.3f}"), ("s1", f"{max(aps):.3f}"))


def _log_label(parameter: Parameter) -> str:
    return parameter.name + (" (log)" if parameter.log else "")


def _figure(title: str, body: str, keys: Sequence[tuple[str, str]] = ()) -> str:
    legend = "".join(f'<span class="key"><i class="{style}"></i>{escape(text)}</span>' for style, text in keys)
    head = f'<figcaption><h3>{escape(title)}</h3><span class="legend">{legend}</span></figcaption>'
    if not body:
        return f'<figure class="chart">{head}<p class="empty">nothing recorded</p></figure>'
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
    return f'<figure class="chart">{head}{svg}</figure>'
