"""One rank of the gather tests: python -m tests.evaluate.gather_worker FOLDER RANK. Writes FOLDER/RANK.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from ray_det.evaluate.gather import gather_lists
from ray_det.evaluate.results import Results
from ray_det.types import Detections
from tests.ranks import process_group

IDS = ([30, 10], [20, 50, 40])
"""Images of each rank: unequally many."""


def detections(image_id: int) -> Detections:
    """As many boxes as the id has tens."""
    n = image_id // 10
    boxes = np.arange(4 * n, dtype=np.float32).reshape(n, 4) + image_id
    return Detections(image_id, boxes, np.linspace(1, 0, n, dtype=np.float32), np.arange(n))


def results(image_ids: Sequence[int]) -> Results:
    return Results.of([detections(i) for i in image_ids])


def as_json(parts: list[Results] | None) -> list | None:
    if parts is None:
        return None
    return [[str(column.dtype), column.tolist()] for column in vars(Results.joined(parts)).values()]


def main(folder: Path, rank: int) -> None:
    with process_group(folder / "store", rank, world=2) as group:
        turned = dist.new_group([1, 0], sort_ranks=False)  # rank 1 is its rank 0
        assert isinstance(turned, dist.ProcessGroup)
        gathered = {
            "joined": as_json(gather_lists([results(IDS[rank])], group)),
            "one_empty": as_json(gather_lists([results(IDS[rank] if rank else [])], group)),
            "turned": gather_lists([rank], turned),
        }
    (folder / f"{rank}.json").write_text(json.dumps(gathered))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
