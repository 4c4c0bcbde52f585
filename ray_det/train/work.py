"""What a rank loads: its micro-batches of an epoch, and of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ray_det.config import TrainJobConfig, micro_batches
from ray_det.data.collate import Shard
from ray_det.data.image import LoadSpec
from ray_det.data.manifest import Manifest
from ray_det.data.plan import EpochPlan, plan_epoch
from ray_det.data.sampling import Sampler, sampler_of
from ray_det.evaluate.split import evaluation_shard
from ray_det.train.job import Job


class Epoch(NamedTuple):
    """One epoch of training."""

    plan: EpochPlan  # of all ranks
    shard: Shard  # of one, from the step on where it begins


@dataclass(frozen=True)
class Work:
    """Of one rank of a job, for a detector whose canvases are multiples of `divisor`."""

    job: Job
    rank: int
    world: int
    divisor: int

    def epoch(self, number: int, step: int = 0) -> Epoch:
        """What is left of an epoch from a step on."""
        plan = self.plan(number)
        own = plan.assign(self.rank, self.world, step)
        return Epoch(plan, Shard(self.job.manifests["train"], own, self._spec(number)))

    def plan(self, epoch: int) -> EpochPlan:
        manifest, config = self.job.manifests["train"], self.job.config
        rows = manifest.trainable_rows()
        number, size = micro_batches(config.train, config.workers.most)
        return plan_epoch(
            manifest.table["height"].to_numpy()[rows],
            manifest.table["width"].to_numpy()[rows],
            rows,
            config.data,
            micro_batches=number,
            micro_batch_size=size,
            divisor=self.divisor,
            seed=config.seed,
            epoch=epoch,
            sampler=self._sampler,
        )

    @cached_property
    def _sampler(self) -> Sampler | None:
        manifest = self.job.manifests["train"]
        return sampler_of(manifest.table, manifest.trainable_rows(), self.job.config.data)

    def _spec(self, epoch: int) -> LoadSpec:
        """How an epoch's images are loaded."""
        config, data = self.job.config, self.job.config.data
        return LoadSpec(
            data.resize,
            data.padding,
            config.seed,
            config.augment.at(epoch, config.train.epochs),
            data.limits,
            skip_bad=data.on_bad_image == "skip",
            patience_s=config.workers.storage_timeout_s,
            scaled_decode=data.scaled_decode,
        )

    @cached_property
    def validation(self) -> Shard:
        return self.evaluation("val")

    def evaluation(self, split: str) -> Shard:
        return evaluation_of(self.job.manifests[split], self.job.config, self.divisor, self.rank, self.world)


def evaluation_of(manifest: Manifest, config: TrainJobConfig, divisor: int, rank: int = 0, world: int = 1) -> Shard:
    """A rank's part of a split, in batches as a run evaluates it."""
    size = config.eval.batch_size or micro_batches(config.train, config.workers.most)[1]
    patience_s = config.workers.storage_timeout_s
    return evaluation_shard(
        manifest, config.data, batch_size=size, divisor=divisor, rank=rank, world=world, patience_s=patience_s
    )
