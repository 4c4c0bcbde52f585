"""The charts of a comparison's page as inline SVG: a row for each arm, dots for its runs, a bar for an interval."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ray_det.report.charts import RIGHT, WIDTH, Axis, Chart, Series, number, render
from ray_det.report.compare_arm import ArmReport
from ray_det.report.sweep_charts import spanned

ROW, ABOVE, BELOW, NAMES = 26, 10, 40, 132  # pixels: a row, above the first, below the last, left of the axis
MAX_NAME = 20


def aps(reports: Sequence[ArmReport]) -> str:
    """Best val/AP of each run, a dot each, and their means."""
    values = [run.trial.best_ap or 0.0 for report in reports for run in report.finished]
    if not values:
        return _figure("val/AP of each seed", "val/AP", None, reports, "")
    x = spanned(values, NAMES, WIDTH - RIGHT)
    body = ""
    for row, report in enumerate(reports):
        style, y = ("s1" if row == 0 else "s0"), _middle(row)
        for run in report.finished:
            title = f"<title>{escape(report.name)}, seed {run.seed}: {run.trial.best_ap or 0.0:.4f}</title>"
            at = x.pixel(run.trial.best_ap or 0.0)
            body += f'<circle class="dot {style} seed" cx="{at:.1f}" cy="{y}" r="4">{title}</circle>'
        if report.val_ap:
            at = x.pixel(report.val_ap.mean)
            body += f'<line class="{style} mean" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 9}" y2="{y + 9}"/>'
    return _figure("val/AP of each seed, and the mean", "val/AP", x, reports, body)


def differences(reports: Sequence[ArmReport]) -> str:
    """Difference of test/AP from the reference, with its interval."""
    known = [report.test_difference for report in reports if report.test_difference]
    title = "Difference of test/AP from the reference, 95 % interval"
    if not known:
        return _figure(title, "difference of test/AP", None, reports, "")
    x = spanned([0.0, *(end for one in known for end in (one.low, one.high))], NAMES, WIDTH - RIGHT)
    zero, floor = x.pixel(0.0), _middle(len(reports)) - ROW / 2
    body = f'<line class="guide" x1="{zero:.1f}" x2="{zero:.1f}" y1="{ABOVE}" y2="{floor}"/>'
    for row, report in enumerate(reports):
        if (one := report.test_difference) is None:
            continue
        style, y = ("s0" if one.clear else "s6"), _middle(row)
        words = f"{report.name}: {one.mean:+.4f}, from {one.low:+.4f} to {one.high:+.4f}"
        low, middle, high = (x.pixel(value) for value in (one.low, one.mean, one.high))
        body += f'<g class="interval"><title>{escape(words)}</title>'
        body += f'<line class="line {style}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
        body += f'<circle class="dot {style}" cx="{middle:.1f}" cy="{y}" r="4.5"/></g>'
    return _figure(title, "difference of test/AP", x, reports, body)


def losses(reports: Sequence[ArmReport]) -> list[str]:
    """Batch loss of each arm's first run over the reference's."""
    reference, *others = reports
    return [
        render(
            Chart(
                f"Batch loss: {report.name}",
                "step",
                "loss",
                [_loss(reference, "s6"), _loss(report, "s0")],
                scale="auto",
            )
        )
        for report in others
        if report.runs
    ]


def _loss(report: ArmReport, style: str) -> Series:
    steps = report.runs[0].steps if report.runs else ()
    xs = [record["global_step"] for record in steps]
    return Series(report.name, xs, [record["train/batch_loss"] for record in steps], style)


def _middle(row: int) -> float:
    return ABOVE + row * ROW + ROW / 2


def _figure(title: str, label: str, x: Axis | None, reports: Sequence[ArmReport], body: str) -> str:
    head = f"<figcaption><h3>{escape(title)}</h3></figcaption>"
    if x is None:
        return f'<figure class="chart">{head}<p class="empty">nothing recorded</p></figure>'
    floor = _middle(len(reports)) - ROW / 2
    parts = []
    for tick in x.ticks:
        at = x.pixel(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{ABOVE}" y2="{floor}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{floor + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{NAMES}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    for row, report in enumerate(reports):
        name = report.name if len(report.name) <= MAX_NAME else report.name[: MAX_NAME - 1] + "…"
        parts.append(f'<text x="{NAMES - 10}" y="{_middle(row) + 4}" text-anchor="end">{escape(name)}</text>')
    middle = (NAMES + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{floor + 33}">{escape(label)}</text>')
    svg = f'<svg viewBox="0 0 {WIDTH} {floor + BELOW}" role="img" aria-label="{escape(title)}">'
    return f'<figure class="chart">{head}{svg}{"".join(parts)}{body}</svg></figure>'
