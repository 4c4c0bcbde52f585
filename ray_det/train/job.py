"""A run as the driver hands it to its workers.

Neither torch nor a model library is imported here: the driver reads this module too, and each import is paid for in the
time to the first step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray_det.config import TrainJobConfig
from ray_det.data.manifest import Manifest
from ray_det.storage import Folder
from ray_det.types import ClassList

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

    from ray_det.cluster import Room


@dataclass(frozen=True)
class RunFacts:
    """What stays the same for all of a run and goes into each of its checkpoints."""

    config: dict[str, Any]
    classes: ClassList
    data_hashes: dict[str, str]
    run_id: str


@dataclass(frozen=True)
class Job:
    """A run as it was asked for."""

    config: TrainJobConfig
    manifests: dict[str, Manifest]  # by split: train, and val and test where given
    run_id: str
    run: Folder
    started_at: float = field(default_factory=time.time)  # seconds since 1970, when the driver started

    @property
    def facts(self) -> RunFacts:
        hashes = {split: manifest.hash for split, manifest in self.manifests.items()}
        return RunFacts(self.config.model_dump(mode="json"), self.manifests["train"].classes, hashes, self.run_id)


@dataclass(frozen=True)
class Payload:
    """What the driver sends to every worker."""

    config: TrainJobConfig
    run_id: str
    run: Folder
    started_at: float
    room: Room
    board: ActorHandle
    manifests: dict[str, ObjectRef[Manifest]]  # by split: in the object store, so that a node holds one copy
    place: PlacementGroup | None  # where epochs are validated in the background, if they are


def train_worker(config: dict[str, Payload]) -> None:
    """What Ray Train runs on every worker."""
    from ray_det.train.worker import run_rank

    run_rank(config["payload"])
