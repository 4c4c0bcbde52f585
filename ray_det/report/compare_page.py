"""`compare.html`: one self-contained page about a comparison; and the same figures in rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from ray_det.report.compare_arm import ArmReport, Spread
from ray_det.report.compare_charts import aps, differences, losses
from ray_det.report.markup import document, duration_of, tile
from ray_det.report.stability import JUMP, WINDOW, Stability

STYLE = ".mean { stroke-width: 2.5; } .seed { opacity: .7; } .line.s6, .line.s0 { stroke-width: 2.2; } "
STYLE += ".charts + .table { margin-top: 12px; } td:first-child { overflow-wrap: normal; min-width: 18ch; } "
STYLE += "td small { display: block; color: var(--soft); } "
STYLE += "tr.reference { font-weight: 600; } .under { margin: 6px 0 0; color: var(--soft); font-size: 12px; } "
STYLE += ".tiles { grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); }"
HEADS = {
    "largest_jump": "largest jump",
    "jumps_share": f"steps above {JUMP:g}x",
    "log_variance": "variance of log loss",
    "grad_norm_p50": "gradient norm p50",
    "grad_norm_p95": "p95",
    "grad_norm_max": "max",
    "nonfinite_steps": "not finite",
}


def figures(report: ArmReport) -> dict[str, Any]:
    """A row of the table: AP with its spread, the difference with its interval, figures of stability."""
    val, test, difference = report.val_ap, report.test_ap, report.test_difference
    return {
        "arm": report.name,
        "changes": "; ".join(f"{name} {value}" for name, value in report.params.items()),
        "runs": len(report.runs),
        "finished": len(report.finished),
        "val/AP": val and val.mean,
        "val/AP_sd": val and val.deviation,
        "test/AP": test and test.mean,
        "test/AP_sd": test and test.deviation,
        "test/AP_difference": difference and difference.mean,
        "test/AP_difference_low": difference and difference.low,
        "test/AP_difference_high": difference and difference.high,
        **{name: report.stability(name) for name in Stability._fields},
    }


def text_table(reports: Sequence[ArmReport]) -> str:
    """For a terminal."""
    rows = [["arm", "val/AP", "test/AP", "difference, 95 % interval", *HEADS.values()]]
    rows += [[report.name, *_aps(report), *_stability(report)] for report in reports]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def compare_page(name: str, reports: Sequence[ArmReport]) -> str:
    """The page's HTML; the reference comes first."""
    states = Counter(run.trial.state for report in reports for run in report.runs)
    facts = [f"{len(reports)} arms", *(f"{count} {state}" for state, count in states.items())]
    parts = [
        f"<style>{STYLE}</style><header><h1>{escape(name)}</h1><p>{escape(' · '.join(facts))}</p></header>",
        _tiles(reports),
        f'<h2>Average precision</h2><section class="charts">{aps(reports)}{differences(reports)}</section>',
        _table(["val/AP", "test/AP", "difference, 95 % interval", "runs"], reports, _ap_cells),
        _under(
            "Mean ± standard deviation over seeds; val/AP of the best epoch, test/AP of its weights. Intervals: paired "
            "bootstrap over the test images and the seeds. A grey one holds 0: the difference may be chance."
        ),
        "<h2>Stability</h2>",
        _table([*HEADS.values()], reports, _stability),
        _under(
            f"Largest jump: batch loss over its median of {WINDOW} steps, the largest of all runs. Variance: within an "
            "epoch, the median over epochs. Gradient norms are before clipping. Means over seeds; largest ones of all."
        ),
        f'<h2>Batch loss, first seed</h2><section class="charts">{"".join(losses(reports))}</section>',
    ]
    return document(name, "\n".join(parts))


def _tiles(reports: Sequence[ArmReport]) -> str:
    known = [report for report in reports if report.val_ap]
    best = max(known, key=lambda report: report.val_ap.mean if report.val_ap else 0.0, default=None)
    clear = [report.name for report in reports if report.test_difference and report.test_difference.clear]
    seconds = [run.trial.seconds for report in reports for run in report.runs if run.trial.seconds]
    tiles = [
        tile("val/AP of the reference", _spread(reports[0].val_ap)),
        tile("Best val/AP", _spread(best.val_ap if best else None), best.name if best else ""),
        tile("Clear differences on test", str(len(clear)), ", ".join(clear)),
        tile("Time of all runs", duration_of(sum(seconds))),
    ]
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _table(heads: Sequence[str], reports: Sequence[ArmReport], cells: Callable[[ArmReport], list[str]]) -> str:
    """A row for each arm."""
    head = "".join(f"<th>{escape(one)}</th>" for one in ("arm", *heads))
    rows = []
    for i, report in enumerate(reports):
        changes = ", ".join(f"{name} {value}" for name, value in report.params.items())
        body = f"<td>{escape(report.name)}<small>{escape(changes)}</small></td>"
        body += "".join(f"<td>{escape(cell)}</td>" for cell in cells(report))
        rows.append(f"<tr{' class=reference' if i == 0 else ''}>{body}</tr>")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _under(text: str) -> str:
    return f'<p class="under">{escape(text)}</p>'


def _ap_cells(report: ArmReport) -> list[str]:
    failed = [run.trial.error for run in report.runs if run.trial.state == "failed"]
    runs = f"{len(report.finished)} of {len(report.runs)}" + (f" ({failed[0]})" if failed else "")
    return [*_aps(report), runs]


def _aps(report: ArmReport) -> list[str]:
    one = report.test_difference
    interval = f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" if one else "–"
    return [_spread(report.val_ap), _spread(report.test_ap), interval]


def _stability(report: ArmReport) -> list[str]:
    values = {name: report.stability(name) for name in HEADS}
    cells = {name: "–" if value is None else f"{value:.3g}" for name, value in values.items()}
    if values["jumps_share"] is not None:
        cells["jumps_share"] = f"{values['jumps_share'] * 100:.2f} %"
    return list(cells.values())


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:.3f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.3f}")
