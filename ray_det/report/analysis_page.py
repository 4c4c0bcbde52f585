"""The part of a report that says what is right and wrong among detections, and the page of an evaluation alone.

Shown is what `analysis.json` holds; see `ray_det.evaluate.analysis_files`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ray_det.report.charts import Chart, Series, render
from ray_det.report.classes import ap50_of, classes_section
from ray_det.report.confusion import confusion_figure, most_confused
from ray_det.report.markup import BOXES, document, finite, mapping, percent, picture, read, share, tile, whole
from ray_det.report.metrics_file import Record

FILE, PICTURES = "analysis.json", "worst_images"
TOGETHER = 5  # classes that share one chart at most
SMALL = 200  # small charts at most
SMALL_WIDTH, SMALL_HEIGHT = 120, 80

AP_AND_AR = (
    '<span class="legend"><span class="key"><i class="s0"></i>AP</span>'
    '<span class="key"><i class="s1"></i>AR</span></span>'
)

KINDS = {
    "classification": "right place, wrong class",
    "localization": "right class, but IoU {low:g} to {high:g}",
    "both": "wrong class, and IoU {low:g} to {high:g}",
    "duplicate": "of an object that is found already",
    "background": "nothing is there",
    "missed": "objects without a detection near",
}


def read_analysis(folder: Path) -> Record:
    """Empty where there is none, or it cannot be read."""
    return mapping(json.loads, read(folder / FILE))


def write_evaluation_page(folder: Path, name: str) -> Path:
    """Write `report.html` of one evaluation into a local folder, from its `summary.json` and `analysis.json`.

    Raises:
        OSError: the folder cannot be written.
    """
    summary, analysis = mapping(json.loads, read(folder / "summary.json")), read_analysis(folder)
    keys = ("AP", "AP50", "AP75", "AR_100")
    tiles = "".join(tile(key.replace("_", " "), share(summary.get(f"{analysis.get('split')}/{key}"))) for key in keys)
    parts = [
        f'<header><h1>{escape(name)}</h1></header><section class="tiles four">{tiles}</section>',
        analysis_sections(analysis, summary, folder),
        classes_section(summary, analysis),
    ]
    path = folder / "report.html"
    path.write_text(document(name, "\n".join(parts)), encoding="utf-8")
    return path


def analysis_sections(analysis: Record, summary: Record, folder: Path) -> str:
    """All but the classes; empty without an analysis."""
    if not analysis:
        return ""
    best = analysis["f1"]["best"]["macro"] or {}
    about = (
        f"{whole(analysis['images'])} images with {whole(sum(analysis['objects']))} objects. A detection is right at "
        f"IoU {analysis['iou']:g}. Errors by kind are of all detections, confusions and worst images of those that the "
        "best mean F1 keeps."
    )
    matched = (
        f"An object goes to the best score at IoU {analysis['iou']:g}, whatever its class. A detection with no object "
        "left lies where there is none, or where a better score took it."
    )
    tiles = [
        tile("Best F1", share(best.get("f1")), "mean over classes"),
        tile("Score threshold", share(best.get("threshold")), "what scores less is left out"),
        tile("Precision there", share(best.get("precision")), "of what is found, what is right"),
        tile("Recall there", share(best.get("recall")), "of what is there, what is found"),
    ]
    charts = [render(_precision(analysis)), render(_f1(analysis)), _errors(analysis), _sizes(analysis, summary)]
    names, cells = analysis["classes"], analysis["confusion"]
    return "\n".join(
        [
            f'<h2>Detections of {escape(analysis["split"])}</h2><p class="about">{about}</p>',
            f'<section class="tiles four">{"".join(tiles)}</section>',
            f'<section class="charts">{"".join(charts)}</section>',
            _small_charts(analysis),
            f'<h2>Confusions</h2><p class="about">{matched}</p>',
            f'<section class="confusions">{confusion_figure(names, cells)}',
            f"{_most_confused(names, cells)}</section>",
            _worst(analysis, folder),
        ]
    )


def _together(analysis: Record) -> list[int]:
    """Classes with objects, where they are few enough for one chart."""
    labels = [label for label, objects in enumerate(analysis["objects"]) if objects]
    return labels if len(labels) <= TOGETHER else []


def _precision(analysis: Record) -> Chart:
    names, curves = analysis["classes"], analysis["precision"]
    known = [curve for curve in curves if curve]
    mean = [sum(column) / len(known) for column in zip(*known, strict=True)]
    lines = [(f"mean {share(ap50_of(mean))}", mean, "s0")]
    lines += [
        (f"{names[i]} {share(ap50_of(curves[i]))}", curves[i], f"s{n % 6 + 1}")
        for n, i in enumerate(_together(analysis))
    ]
    series = [Series(name, [i / 100 for i in range(len(curve))], curve, style) for name, curve, style in lines]
    title = f"Precision and recall at IoU {analysis['iou']:g}" + (", mean over classes" if len(series) == 1 else "")
    return Chart(title, "recall", "precision", series, whole_x=False, y_to=1)


def _f1(analysis: Record) -> Chart:
    f1, names = analysis["f1"], analysis["classes"]
    best = f1["best"]["macro"]
    lines = [("mean over classes", f1["macro"], "s0"), ("all objects alike", f1["micro"], "s6")]
    lines += [(names[i], f1["classes"][i], f"s{n % 5 + 1}") for n, i in enumerate(_together(analysis))]
    return Chart(
        "F1 by the lowest score that is kept",
        "score",
        "F1",
        [Series(name, f1["thresholds"], values, style) for name, values, style in lines],
        x_line=(best["threshold"], f"best {share(best['f1'])} at {share(best['threshold'])}") if best else None,
        whole_x=False,
        y_to=1,
    )


def _errors(analysis: Record) -> str:
    """Bars of TIDE's kinds of errors (https://arxiv.org/abs/2008.08115), over all scores."""
    limits = {"low": analysis["background_iou"], "high": analysis["iou"]}
    rows = [
        (kind.capitalize(), KINDS[kind].format(**limits), whole(error["count"]), f"+{max(error['dAP50'], 0.0):.3f}")
        for kind, error in analysis["errors"].items()
    ]
    gains = [max(error["dAP50"], 0.0) for error in analysis["errors"].values()]
    widths = [[gain / max(*gains, 1e-9)] for gain in gains]
    return _bars("Errors by kind, and what AP50 gains without them", ["number", "AP50"], rows, widths)


def _sizes(analysis: Record, summary: Record) -> str:
    sizes = {"Small": "under 32² pixels", "Medium": "32² to 96² pixels", "Large": "over 96² pixels"}
    rows, widths = [], []
    for size, meaning in sizes.items():
        values = [summary.get(f"{analysis['split']}/{key}_{size.lower()}") for key in ("AP", "AR")]
        rows.append((size, meaning, *map(share, values)))
        widths.append([min(max(finite(value, 0.0), 0.0), 1.0) for value in values])
    return _bars("By size of the objects", ["AP", "AR"], rows, widths, AP_AND_AR)


def _bars(
    title: str, heads: Sequence[str], rows: list[tuple[str, ...]], widths: list[list[float]], keys: str = ""
) -> str:
    """Rows of (name, meaning, a number under each head), each with bars of widths in 0..1."""
    body = []
    for (name, meaning, *numbers), parts in zip(rows, widths, strict=True):
        cells = "".join(f"<td>{value}</td>" for value in numbers)
        bars = "".join(f'<div style="width:{width * 100:.1f}%"></div>' for width in parts)
        body.append(f'<tr><td>{name}<small>{meaning}</small></td>{cells}<td class="bar">{bars}</td></tr>')
    head = "".join(f"<th>{head}</th>" for head in heads)
    return (
        f'<figure class="chart bars"><figcaption><h3>{title}</h3>{keys}</figcaption><table><thead><tr><th></th>{head}'
        f"<th></th></tr></thead><tbody>{''.join(body)}</tbody></table></figure>"
    )


def _small_charts(analysis: Record) -> str:
    """A precision-recall curve of each class, where they are too many for one chart; the best first."""
    labels = [label for label, objects in enumerate(analysis["objects"]) if objects]
    if len(labels) <= TOGETHER:
        return ""
    curves = analysis["precision"]
    labels.sort(key=lambda label: -ap50_of(curves[label]))
    figures = [_small_chart(analysis["classes"][i], curves[i], analysis["objects"][i]) for i in labels[:SMALL]]
    note = f": the best {SMALL} of {len(labels)}" if len(labels) > SMALL else ""
    return (
        f'<h3 class="over">Precision and recall by class{note}</h3><section class="small">{"".join(figures)}</section>'
    )


def _small_chart(name: str, curve: list[float], objects: int) -> str:
    width, height = SMALL_WIDTH, SMALL_HEIGHT
    turns = [i for i in range(len(curve)) if not 0 < i < len(curve) - 1 or not curve[i - 1] == curve[i] == curve[i + 1]]
    grid = f"M0 0H{width}M0 {height / 2}H{width}M{width / 2} 0V{height}"
    points = " ".join(f"{i * width / (len(curve) - 1):.1f},{(1 - curve[i]) * height:.1f}" for i in turns)
    return (
        f'<figure title="{escape(name)}: {objects} objects"><figcaption><span>{escape(name)}</span>'
        f'<b>{share(ap50_of(curve))}</b></figcaption><svg viewBox="0 -1 {width} {height + 2}" role="img" '
        f'aria-label="{escape(name)}"><path class="grid" d="{grid}"/><path class="axis" d="M0 0V{height}H{width}"/>'
        f'<polyline class="line s0" points="{points}"/></svg></figure>'
    )


def _most_confused(names: Sequence[str], cells: Sequence[Sequence[int]]) -> str:
    found = most_confused(names, cells)
    if not found:
        return ""
    rows = "".join(
        f"<tr><td>{escape(one.true)}</td><td>{escape(one.found)}</td><td>{whole(one.objects)}</td>"
        f"<td>{percent(one.share)}</td></tr>"
        for one in found
    )
    return (
        '<figure class="chart bars"><figcaption><h3>Most frequent confusions</h3></figcaption><table><thead><tr>'
        "<th>true</th><th>found as</th><th>objects</th><th>of the class</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></figure>"
    )


def _worst(analysis: Record, folder: Path) -> str:
    figures = []
    for image in analysis["worst"]:
        path = folder / PICTURES / (image["picture"] or "")
        if not path.is_file():
            continue
        counts = ", ".join(f"{image[what]} {what}" for what in ("right", "wrong", "missed"))
        figures.append(picture(path, f"{image['file_name']}: F1 {share(image['f1'])}, {counts}"))
    if not figures:
        return ""
    return f'<h2>Worst images</h2>{BOXES}<section class="pictures">{"".join(figures)}</section>'
