"""What an epoch costs on a cluster: measured and assumed costs of single operations, put together as this code does it.

Per epoch, every rank plans all images, cuts out its own rows and hands them to Ray; loader tasks on its node read,
decode and pad its micro-batches; the ranks step together; rank 0 keeps a checkpoint while they go on.
Validation is left out. The model is closed: it has no queues and no chance in it, so it is a bound from above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ray_det.config import Section

GB, MIB = 1e9, 1 << 20
OBJECT_STORE_SHARE = 0.3  # of a node's memory, Ray's default
NOTICEABLE = 0.1
"""Share of an epoch that something must cost to be called its bottleneck."""

Origin = Literal["code", "measured", "others", "assumed"]
"""Of a number: it stands in this code; was measured with it; was published by others; is a guess at the reader's
cluster; or is to be replaced by a measurement that is under way."""


def number(value: float, origin: Origin, text: str) -> Any:
    return Field(default=value, gt=0, description=text, json_schema_extra={"origin": origin})


class Costs(Section):
    """Of single operations. Times are seconds, GB are 1e9 bytes."""

    gpu_images_per_s: float = number(
        265, "others", "images/s of one GPU on ready batches (MLPerf RetinaNet, 800 x 800, H100)"
    )
    model_params: float = number(38e6, "others", "parameters of that model")
    batch: int = number(16, "assumed", "images per GPU and step")
    backward_share: float = number(2 / 3, "assumed", "share of a step in which gradients can travel")
    step_spread: float = number(0.02, "assumed", "standard deviation of step times among GPUs, share of a step")
    bucket_bytes: float = number(
        25 * MIB, "code", "bytes of gradients that travel together; the last ones are waited for"
    )
    node_gpus: int = number(8, "assumed", "GPUs of a node")
    nvlink_gb_s: float = number(300, "assumed", "all-reduce bandwidth of a GPU inside a node, GB/s")
    fabric_gb_s: float = number(40, "assumed", "all-reduce bandwidth of a GPU between nodes, GB/s")
    hop_s: float = number(20e-6, "assumed", "latency of a hop of a collective, s")

    jpeg_bytes: float = number(156e3, "measured", "bytes of a file (mean of 123 photographs of COCO)")
    canvas_bytes: float = number(3 * 800 * 800, "code", "bytes of an image as it travels: uint8, decoded and padded")
    loader_cpu_s: float = number(0.008, "measured", "CPU seconds to decode, augment and resize an image to 800 x 800")
    loader_reads: int = number(16, "code", "files that a loader task reads at once, on one CPU")
    block_bytes: float = number(64 * MIB, "code", "bytes of the pixels that a loader task makes")
    node_cpus: int = number(192, "assumed", "CPUs of a node")
    worker_cpus: float = number(1, "code", "CPUs that a train worker reserves")
    block_gb_s: float = number(2, "assumed", "GB/s that a node takes in from other nodes' object stores")

    store_latency_s: float = number(0.05, "assumed", "latency of a request to the object store, s")
    stream_gb_s: float = number(0.08, "assumed", "GB/s of one connection to it")
    store_node_gb_s: float = number(10, "assumed", "GB/s of a node's connections to it")
    prefix_requests_per_s: float = number(5500, "others", "GETs/s that Amazon S3 gives to a partition of the keys")
    request_usd: float = number(4e-7, "others", "price of a GET or HEAD of Amazon S3, USD")
    pack_bytes: float = number(256 * MIB, "code", "bytes of a shard file (prepare.py --pack_mb)")
    open_shards: int = number(64, "code", "shard files that a loader process keeps open")

    manifest_bytes: float = number(546, "measured", "bytes of an image's row in memory, with 7.3 boxes")
    plan_s: float = number(3.1e-7, "measured", "seconds per image to plan an epoch, on every rank")
    plan_bytes: float = number(
        72, "measured", "bytes per image while it is planned, beside the epoch before, on every rank"
    )
    first_batch_s: float = number(0.1, "measured", "seconds from an epoch's last batch to the first of the next")
    node_memory_gb: float = number(2048, "assumed", "memory of a node, GB")

    checkpoint_bytes: float = number(12, "code", "bytes per parameter: weights and two moments, float32")
    disk_gb_s: float = number(1, "assumed", "GB/s at which rank 0 writes them to its disk")
    hash_gb_s: float = number(1.8, "measured", "GB/s of SHA-256")
    upload_gb_s: float = number(0.2, "assumed", "GB/s at which they are copied to the storage")
    snapshot_gb_s: float = number(10, "assumed", "GB/s at which they are copied in memory first")
    gpu_hour_usd: float = number(4, "assumed", "price of a GPU for an hour, USD")

    @model_validator(mode="after")
    def _cpus_for_loaders(self) -> Self:
        if self.node_cpus <= (taken := self.node_gpus * self.worker_cpus):
            raise ValueError(
                f"--node_cpus {self.node_cpus}: expected > {taken:g}, what the workers of {self.node_gpus} GPUs reserve"
            )
        return self


@dataclass(frozen=True)
class Layout:
    """How images are stored and who loads them."""

    name: str
    packed: bool  # in shard files; else a file each
    prefixes: int = 1  # partitions of the keys
    sizes_known: bool = False  # files are opened without asking for their size
    spread: bool = False  # loader tasks run anywhere; else on the node that trains on what they load
    own_rows: bool = False  # a node holds, and a rank plans, their own rows; else all


FILES = Layout("small files", packed=False)
PACKED = Layout("packed", packed=True)
SPREAD_KEYS = Layout("packed in 64 prefixes", packed=True, prefixes=64)
CHANGED = Layout("changed", packed=True, prefixes=64, sizes_known=True, own_rows=True)
ANYWHERE = Layout("packed in 64 prefixes, loaders anywhere", packed=True, prefixes=64, spread=True)


@dataclass(frozen=True)
class Estimate:
    """One epoch of `images` on `gpus`. Rates are images/s of the whole cluster, times are seconds."""

    limits: dict[str, float]  # in steady state, by what sets them
    steps_s: float  # at the lowest limit
    turnover_s: dict[str, float]  # between epochs, by what takes it
    images: float

    @property
    def epoch_s(self) -> float:
        return self.steps_s + sum(self.turnover_s.values())

    @property
    def images_per_s(self) -> float:
        return self.images / self.epoch_s

    @property
    def bottleneck(self) -> str:
        """What costs most beside the GPUs' own work, if that is noticeable."""
        name = min(self.limits, key=self.limits.__getitem__)
        lost = {name: self.steps_s * (1 - self.limits[name] / self.limits["GPUs"]), **self.turnover_s}
        worst = max(lost, key=lost.__getitem__)
        return worst if lost[worst] >= NOTICEABLE * self.epoch_s else "GPUs"


def estimate(costs: Costs, layout: Layout, gpus: int, images: float) -> Estimate:
    """An epoch on whole nodes, or on a part of one."""
    limits = steady_limits(costs, layout, gpus, images)
    batch = gpus * costs.batch
    steps = math.ceil(images / batch)  # the last global batch is filled up
    turnover = {
        "plan": costs.plan_s * (images / gpus if layout.own_rows else images),
        "first batch": costs.first_batch_s,
        "checkpoint": checkpoint_s(costs, costs.model_params),
    }
    return Estimate(limits, steps * batch / min(limits.values()), turnover, images)


def steady_limits(costs: Costs, layout: Layout, gpus: int, images: float) -> dict[str, float]:
    """images/s that each part of the cluster could do alone.

    A loader task waits for its first files, then decodes while it reads the others, some at once.
    """
    nodes = nodes_of(costs, gpus)
    cpus = gpus * (costs.node_cpus / costs.node_gpus - costs.worker_cpus)
    requests = requests_per_image(costs, layout, images)
    read_s = requests * costs.store_latency_s + costs.jpeg_bytes / (costs.stream_gb_s * GB)
    task_images = costs.block_bytes / costs.canvas_bytes
    rounds = task_images / costs.loader_reads
    moved = bytes_between_nodes(costs, layout, gpus)
    return {
        "GPUs": gpus * costs.batch / step_s(costs, gpus),
        "decoding": cpus / costs.loader_cpu_s,
        "store's latency": cpus * task_images / max(read_s + task_images * costs.loader_cpu_s, rounds * read_s),
        "store's requests": layout.prefixes * costs.prefix_requests_per_s / requests,
        "store's bandwidth": nodes * costs.store_node_gb_s * GB / costs.jpeg_bytes,
        "blocks between nodes": nodes * costs.block_gb_s * GB / moved if moved else math.inf,
    }


def nodes_of(costs: Costs, gpus: int) -> int:
    return math.ceil(gpus / costs.node_gpus)


def step_s(costs: Costs, gpus: int) -> float:
    """A step: the slowest GPU's (of W normal ones, sqrt(2 ln W) deviations late), and the all-reduce that it shows."""
    compute = costs.batch / costs.gpu_images_per_s
    slowest = compute * (1 + costs.step_spread * math.sqrt(2 * math.log(gpus)))
    whole, last = (all_reduce_s(costs, gpus, size) for size in (4 * costs.model_params, costs.bucket_bytes))
    exposed = max(last, whole - costs.backward_share * compute)
    return slowest + exposed + all_reduce_s(costs, gpus, 0)  # the last: the step's losses


def all_reduce_s(costs: Costs, gpus: int, size: float) -> float:
    """A ring over the slowest link, with the latency of a tree."""
    if gpus == 1:
        return 0.0
    bandwidth = (costs.nvlink_gb_s if gpus <= costs.node_gpus else costs.fabric_gb_s) * GB
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * math.ceil(math.log2(gpus)) * costs.hop_s


def requests_per_image(costs: Costs, layout: Layout, images: float) -> float:
    """A GET, and a HEAD for every opening: of each small file, of each shard that is not open any more."""
    if layout.sizes_known:
        return 1.0
    if not layout.packed:
        return 2.0
    shards = math.ceil(images * costs.jpeg_bytes / costs.pack_bytes)
    return 2 - min(1, costs.open_shards / shards)


def bytes_between_nodes(costs: Costs, layout: Layout, gpus: int) -> float:
    """Bytes per image that leave a node: its pixels, unless they are loaded where they are used."""
    nodes = nodes_of(costs, gpus)
    return (nodes - 1) / nodes * costs.canvas_bytes if layout.spread else 0.0


def node_memory(costs: Costs, layout: Layout, gpus: int, images: float) -> dict[str, float]:
    """Bytes that grow with the data set, on a fully used node: in processes, and in the object store."""
    ranks = min(gpus, costs.node_gpus)
    planned = images / gpus if layout.own_rows else images
    return {
        "plans": ranks * planned * costs.plan_bytes,
        "object store": (images * ranks / gpus if layout.own_rows else images) * costs.manifest_bytes,
    }


def fits(costs: Costs, memory: dict[str, float]) -> bool:
    """Whether a node holds it, in its memory and in Ray's share of it."""
    whole = costs.node_memory_gb * GB
    return sum(memory.values()) <= whole and memory["object store"] <= OBJECT_STORE_SHARE * whole


def checkpoint_s(costs: Costs, params: float) -> float:
    """How long training stands still for one: while it is copied in memory."""
    return params * costs.checkpoint_bytes / GB / costs.snapshot_gb_s


def writing_s(costs: Costs, params: float) -> float:
    """How long it takes to be kept, while training goes on."""
    size = params * costs.checkpoint_bytes / GB
    return size / costs.disk_gb_s + size / costs.hash_gb_s + size / costs.upload_gb_s
