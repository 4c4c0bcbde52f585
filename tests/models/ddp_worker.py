"""Both ranks of the DDP tests: python ddp_worker.py FOLDER RANK. Writes FOLDER/RANK.json, {family: results}.

Two plain gloo processes, `find_unused_parameters=False`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.models.zoo import FAMILIES, batch, build, gradients
from tests.ranks import process_group


def empty_steps(family: str, rank: int) -> dict:
    """Three steps, the ranks taking turns with a micro-batch without a single box."""
    model = DistributedDataParallel(build(family).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = model(batch(2, seed=step, boxes=step % 2 != rank))["loss"]
        loss.backward()
        gradients(model)
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "weight_sum": sum(p.double().sum().item() for p in model.parameters())}


def gradient_gap(family: str, rank: int) -> float:
    """Largest difference between DDP's gradient and the mean of both micro-batches in one process, as a share."""
    model = DistributedDataParallel(build(family).train())
    torch.manual_seed(100 + rank)
    model(batch(2, seed=rank, boxes=True))["loss"].backward()
    alone = build(family).train()
    for micro in range(2):
        torch.manual_seed(100 + micro)
        (alone(batch(2, seed=micro))["loss"] / 2).backward()
    expected = gradients(alone)
    return ((gradients(model) - expected).abs().max() / expected.abs().max()).item()


def main(folder: Path, rank: int) -> None:
    with process_group(folder / "store", rank, world=2):
        results = {f: empty_steps(f, rank) | {"gap": gradient_gap(f, rank)} for f in FAMILIES}
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
