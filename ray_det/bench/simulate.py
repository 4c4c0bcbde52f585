"""What the measured costs add up to on large clusters: prints the tables of docs/scaling.md.

Every number it starts from is an option; `--doc docs/scaling.md` puts the tables into that file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from pydantic import Field

from ray_det.bench.measure import Figure
from ray_det.bench.scaling import (
    ANYWHERE,
    CHANGED,
    FILES,
    GB,
    PACKED,
    SPREAD_KEYS,
    Costs,
    Layout,
    bytes_between_nodes,
    checkpoint_s,
    estimate,
    fits,
    node_memory,
    nodes_of,
    requests_per_image,
    steady_limits,
    writing_s,
)
from ray_det.types import UserError

GPUS = (8, 64, 512, 1024)
IMAGES = (10**5, 10**6, 10**7, 10**8, 10**9)
LAYOUTS = (FILES, PACKED, SPREAD_KEYS, ANYWHERE, CHANGED)
MODELS = {"D-FINE-S": 10e6, "RetinaNet": 38e6, "a large one": 300e6}
RATES = {"D-FINE-S, float32, A100 (others' figure)": 15.0, "between": 100.0, "RetinaNet, H100": 265.0}
CHUNK_BYTES = 8e6  # that one request could read where neighbours in a shard were wanted together


class Config(Costs):
    doc: str | None = Field(default=None, description="a file whose tables are replaced by these")


def run(config: Config) -> Iterator[Figure]:
    """Prints; there is nothing to measure."""
    found = tables(Costs.model_validate(config.model_dump(exclude={"doc"})))
    if config.doc:
        _write(Path(config.doc), found)
    print("\n\n".join(f"{name}\n\n{table}" for name, table in found.items()))
    return iter(())


def _write(path: Path, found: dict[str, str]) -> None:
    try:
        text = path.read_text()
        if not any(f"<!-- {name} -->" in text for name in found):
            raise UserError(f"--doc {path}: there is none of the marks <!-- {' -->, <!-- '.join(found)} -->")
        path.write_text(fill(text, found))
    except OSError as error:
        raise UserError(f"--doc {path}: {error.strerror}") from None


def fill(text: str, found: dict[str, str]) -> str:
    """The text with what stands between `<!-- NAME -->` and `<!-- end -->` replaced by the table of that name."""
    for name, table in found.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marks.sub(lambda mark, table=table: f"{mark[1]}{table}\n{mark[2]}", text)
    return text


def tables(costs: Costs) -> dict[str, str]:
    """Markdown tables by name."""
    return {
        "numbers": numbers(costs),
        "limits": limits(costs),
        **{f"epochs, {layout.name}": epochs(costs, layout) for layout in (FILES, SPREAD_KEYS, CHANGED)},
        "requests": requests(costs),
        "between nodes": between_nodes(costs),
        "memory": memory(costs),
        "checkpoints": checkpoints(costs),
        "CPUs": cpus(costs),
    }


def numbers(costs: Costs) -> str:
    fields = type(costs).model_fields
    rows = [
        (f"`{name}`", plain(getattr(costs, name)), cast(dict, field.json_schema_extra)["origin"], field.description)
        for name, field in fields.items()
    ]
    return markdown(("option", "value", "origin", "what it is"), rows)


def limits(costs: Costs, images: int = 10**7) -> str:
    """Layouts that share a limit share its row."""
    rows = []
    by_layout = {layout.name: [steady_limits(costs, layout, n, images) for n in GPUS] for layout in LAYOUTS}
    for limit in by_layout[FILES.name][0]:
        seen: dict[tuple[str, ...], list[str]] = {}
        for name, columns in by_layout.items():
            seen.setdefault(tuple(short(column[limit]) for column in columns), []).append(name)
        rows += [
            (limit, "all" if len(names) == len(LAYOUTS) else "; ".join(names), *cells) for cells, names in seen.items()
        ]
    return markdown(("images/s, at most", "layout", *(f"{n} GPUs" for n in GPUS)), rows)


def epochs(costs: Costs, layout: Layout) -> str:
    def cell(gpus: int, images: int) -> str:
        if not fits(costs, node_memory(costs, layout, gpus, images)):
            return "memory"
        one = estimate(costs, layout, gpus, images)
        return f"{short(one.images_per_s)}/s, {duration(one.epoch_s)}: {one.bottleneck}"

    rows = [(power(images), *(cell(gpus, images) for gpus in GPUS)) for images in IMAGES]
    return markdown(("images", *(f"{n} GPUs" for n in GPUS)), rows)


def requests(costs: Costs) -> str:
    def cells(images: int) -> Iterator[str]:
        yield f"{short(images * costs.jpeg_bytes / 1e12)} TB"
        counts = (requests_per_image(costs, layout, images) for layout in (FILES, PACKED, CHANGED))
        for count in (*counts, costs.jpeg_bytes / CHUNK_BYTES):
            yield f"{short(images * count)}, {short(images * count * costs.request_usd)} USD"
        hours = images / costs.gpu_images_per_s / 3600
        yield f"{short(hours * costs.gpu_hour_usd)} USD"

    names = (FILES.name, PACKED.name, CHANGED.name, "read in chunks of 8 MB")
    head = ("images", "read", *(f"requests, {name}" for name in names), "GPUs, for comparison")
    return markdown(head, [(power(images), *cells(images)) for images in IMAGES])


def between_nodes(costs: Costs) -> str:
    rows = []
    for text, layout, decoders in (
        ("loaders on the GPUs' own node (as it is)", FILES, False),
        ("loaders anywhere", ANYWHERE, False),
        ("loaders on CPU nodes", CHANGED, True),
    ):
        cells = []
        for gpus in GPUS:
            moved = costs.canvas_bytes if decoders else bytes_between_nodes(costs, layout, gpus)
            rate = moved * gpus * costs.gpu_images_per_s / nodes_of(costs, gpus) / GB
            cells.append(f"{short(moved / 1e6)} MB, {short(rate)} GB/s")
        rows.append((text, *cells))
    return markdown(("per image, and into each GPU node", *(f"{n} GPUs" for n in GPUS)), rows)


def memory(costs: Costs) -> str:
    def cell(layout: Layout, gpus: int, images: int) -> str:
        parts = node_memory(costs, layout, gpus, images)
        text = f"{short((sum(parts.values()) - parts['object store']) / GB)} + {short(parts['object store'] / GB)} GB"
        return text if fits(costs, parts) else f"{text}: too much"

    arms = [(layout, gpus) for layout in (FILES, CHANGED) for gpus in (GPUS[0], GPUS[-1])]
    rows = [(power(images), *(cell(layout, gpus, images) for layout, gpus in arms)) for images in IMAGES]
    names = {FILES.name: "as it is", CHANGED.name: "changed"}
    return markdown(("images", *(f"{names[layout.name]}, {gpus} GPUs" for layout, gpus in arms)), rows)


def checkpoints(costs: Costs) -> str:
    rows = []
    for name, params in MODELS.items():
        rows.append(
            (
                f"{name}, {short(params)} parameters",
                f"{short(params * costs.checkpoint_bytes / 1e6)} MB",
                duration(checkpoint_s(costs, params)),
                duration(writing_s(costs, params)),
            )
        )
    return markdown(("model", "checkpoint", "training stands still", "kept after"), rows)


def cpus(costs: Costs) -> str:
    """CPUs for loaders that a GPU needs: more than either decoding or waiting for the store takes."""

    def cell(rate: float, layout: Layout) -> str:
        one = steady_limits(costs, layout, costs.node_gpus, 10**7)
        per_cpu = min(one["decoding"], one["store's latency"])
        loaders = costs.node_gpus * (costs.node_cpus / costs.node_gpus - costs.worker_cpus)
        return f"{rate * loaders / per_cpu:.1f}"

    rows = [
        (name, f"{rate * costs.loader_cpu_s:.1f}", *(cell(rate, layout) for layout in (FILES, CHANGED)))
        for name, rate in RATES.items()
    ]
    return markdown(("images/s of a GPU", "local files", "object store, as it is", "object store, changed"), rows)


def markdown(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def power(images: int) -> str:
    return f"10^{len(str(images)) - 1}"


def plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def short(value: float) -> str:
    """Three digits: 0.0123, 12.3, 1,230, 12,300, 1.23 M."""
    if value == float("inf"):
        return "no limit"
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    if value >= 99.95:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{short(seconds)} s"
