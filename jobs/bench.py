"""Measure ray_det against its peers: `python jobs/bench.py SUBCOMMAND [--option VALUE ...]`.

Figures come as JSON, one line each, on standard output, and as a table for people on standard error.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys

from ray_det import cli
from ray_det.types import UserError

SUBCOMMANDS = {
    "ingest": "images/s of the data pipeline, its first batch, decoding",
    "step": "one optimizer step on ready batches",
    "throughput": "images/s on ready batches by batch size, eager and compiled; on a GPU MFU and idle share",
    "train": "images/s from files to weights",
    "eval": "COCO scoring",
    "serve": "requests/s and latencies of a served model, and an overload of it",
    "startup": "seconds to the first optimizer step",
    "plan": "the plan of an epoch: padded pixels, seconds, memory",
    "checkpoint": "how long training waits for a checkpoint",
    "simulate": "what the measured costs add up to on large clusters",
}


def main() -> None:
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"  {sub:<12}{text}" for sub, text in SUBCOMMANDS.items()))
        print("\nSUBCOMMAND --help lists its options.")
        return
    if name not in SUBCOMMANDS:
        raise UserError(f"unknown sub-command {name!r}; there are {', '.join(SUBCOMMANDS)}")
    module = importlib.import_module(f"ray_det.bench.{name}")
    config, _ = cli.parse(module.Config, argv, description=module.__doc__ or "")

    from ray_det.bench.measure import table

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what it started ends with it
    figures = []
    for figure in module.run(config):
        print(json.dumps(figure.to_json()), flush=True)
        figures.append(figure)
    if figures:
        print(table(figures), file=sys.stderr)


if __name__ == "__main__":
    cli.main(main)
