"""`sweep.html`: one self-contained page about a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from ray_det.report.markup import document
from ray_det.report.progress import duration
from ray_det.report.sweep_charts import Parameter, curves, evaluated, parallel, plane
from ray_det.report.sweep_trial import SweepTrial

FEWEST = 6
"""Trials from which on the importance of a parameter is worked out."""
MAX_PLANES = 3


def sweep_page(
    name: str, trials: Sequence[SweepTrial], searched: Sequence[str], logs: Sequence[str], best: SweepTrial | None
) -> str:
    """The page's HTML.

    Args:
        trials: best first.
        searched: parameters by dotted name; `logs` are those of them on a log scale.
    """
    parameters = [Parameter.of(one, trials, log=one in logs) for one in searched] if trials else []
    pairs = list(combinations(parameters, 2))[:MAX_PLANES]
    charts = [curves(trials, best), *(plane(a, b, trials, best) for a, b in pairs), parallel(parameters, trials, best)]
    states = Counter(trial.state for trial in trials)
    facts = [f"{len(trials)} trials", *(f"{count} {state}" for state, count in states.items())]
    style = (Path(__file__).parent / "sweep.css").read_text(encoding="utf-8")
    parts = [
        f"<style>{style}</style><header><h1>{escape(name)}</h1><p>{escape(' · '.join(facts))}</p></header>",
        _tiles(trials, best),
        f'<h2>Trials</h2><section class="charts">{"".join(charts)}</section>',
        _importance(parameters, trials),
        _table(trials, searched, best),
    ]
    return document(name, "\n".join(parts))


def importance(parameter: Parameter, trials: Sequence[SweepTrial]) -> float | None:
    """Share of the variance of the ranks of val/AP that this parameter alone explains, in 0..1.

    It is the adjusted R² of a parabola in the parameter (in its logarithm on a log scale), for an optimum lies inside;
    of the means of its choices where it has such. Trials are compared after as many epochs as all of them have had.
    None: too few trials, or all have the same value.
    """
    known = [trial for trial in evaluated([parameter], trials) if trial.state in ("finished", "stopped")]
    places = np.array([parameter.at(trial) for trial in known])
    values = len(np.unique(places))
    if len(known) < FEWEST or values < 2:
        return None
    epochs = min(trial.epochs for trial in known)
    ranks = rankdata([max(ap for epoch, ap in trial.curve if epoch <= epochs) for trial in known])
    if np.ptp(ranks) == 0:
        return 0.0
    if parameter.choices:
        fitted = np.array([ranks[places == place].mean() for place in places])
        freedom = values - 1
    else:
        places = np.log(places) if parameter.log else places
        freedom = min(2, values - 1)
        centred = (places - places.mean()) / places.std()
        fitted = np.polyval(np.polyfit(centred, ranks, freedom), centred)
    left = len(known) - freedom - 1
    if left < 1:
        return None
    explained = 1 - np.sum((ranks - fitted) ** 2) / np.sum((ranks - ranks.mean()) ** 2)
    return float(np.clip(1 - (1 - explained) * (len(known) - 1) / left, 0, 1))


def _tiles(trials: Sequence[SweepTrial], best: SweepTrial | None) -> str:
    seconds = [trial.seconds for trial in trials if trial.seconds is not None]
    epochs = sum(trial.epochs for trial in trials)
    whole = max((trial.epochs for trial in trials), default=0) * len(trials)
    tiles = [
        ("Best val AP", _share(best.best_ap if best else None), best.name if best else ""),
        ("Its test AP", _share(best.test_ap if best else None), ""),
        ("Epochs trained", f"{epochs}", f"of {whole}, had no trial been stopped"),
        ("Time of all trials", duration(sum(seconds)) if seconds else "–", ""),
    ]
    cells = (
        f'<div class="tile"><div class="what">{what}</div><div class="value">{escape(value)}</div>'
        f'<div class="more">{escape(more)}</div></div>'
        for what, value, more in tiles
    )
    return f'<section class="tiles">{"".join(cells)}</section>'


def _importance(parameters: Sequence[Parameter], trials: Sequence[SweepTrial]) -> str:
    found = [(parameter.name, importance(parameter, trials)) for parameter in parameters]
    rows = [
        f"<tr><td>{escape(name)}</td><td>{share * 100:.0f} %</td>"
        f'<td class="bar"><div style="width:{share * 100:.1f}%"></div></td></tr>'
        for name, share in found
        if share is not None
    ]
    if not rows:
        return ""
    head = "<tr><th>parameter</th><th>of the variance of val/AP</th><th></th></tr>"
    note = (
        "What a parabola in the parameter alone explains of the ranks, adjusted for the number of trials, "
        "after as many epochs as all of them have had."
    )
    return f'{_titled("Importance", head, rows)}<p class="under">{note}</p>'


def _table(trials: Sequence[SweepTrial], searched: Sequence[str], best: SweepTrial | None) -> str:
    columns = ["trial", *searched, "val AP", "test AP", "epochs", "time", "state"]
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    rows = []
    for trial in trials:
        cells = [trial.name, *(_value(trial.params.get(one)) for one in searched)]
        cells += [_share(trial.best_ap), _share(trial.test_ap), str(trial.epochs)]
        cells += ["–" if trial.seconds is None else duration(trial.seconds)]
        cells += [trial.state + (f": {trial.error}" if trial.error else "")]
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr{' class=best' if trial is best else ''}>{body}</tr>")
    return _titled("All trials", f"<tr>{head}</tr>", rows)


def _titled(title: str, head: str, rows: Sequence[str]) -> str:
    body = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h2>{title}</h2><div class="table">{body}</div>'


def _value(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _share(value: float | None) -> str:
    return "–" if value is None or not value >= 0 else f"{value:.3f}"
