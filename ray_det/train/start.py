"""From a configuration to a run that may begin: data prepared, compared with what the run folder holds."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from ray_det.cli import to_yaml
from ray_det.config import DatasetConfig, TrainJobConfig, changed_keys, micro_batches
from ray_det.data import embedded
from ray_det.data.classes import Selection
from ray_det.data.headers import MapChunks
from ray_det.data.manifest import Manifest, write_manifest
from ray_det.data.preflight import require_trainable
from ray_det.data.prepare import prepare, same_classes
from ray_det.data.twins import find_twins
from ray_det.retry import reason
from ray_det.storage import Folder
from ray_det.train.job import Job
from ray_det.types import UserError

SPLITS = ("train", "val", "test")
KINDS = {"run.json": "training run", "sweep.json": "sweep", "comparison.json": "comparison"}
"""File -> what a folder is that has it."""
PLACES = tuple(f"data.{name}:" for name in (*SPLITS, "images"))
"""Where the data is: what it holds is compared by its hash."""
MAY_CHANGE = ("workers.", "wandb.", "overwrite", "allow_changes", "storage", "train.checkpoint_every_steps", *PLACES)
MAY_CHANGE += ("data.max_", "data.on_bad_image", "train.max_rollbacks")
MAY_CHANGE += ("train.async_checkpoints", "train.profile_steps")
"""What a run may be continued with differently: nothing here touches what is learned, from images that are whole."""
FIXED = ("model.name", "model.config", "model.fpn_channels", "data.classes", "data.rename")
"""What a trained network is, and so cannot change at all."""


def cache_folder(storage: str) -> Path:
    """Where prepared manifests and the embedded data set are kept, on the local disk."""
    local = Folder.at(storage).local
    return local / ".cache" if local else Path.home() / ".cache" / "ray_det"


def begin(config: TrainJobConfig, started_at: float, say: Callable[[str], None], map_chunks: MapChunks) -> Job:
    """Prepare the data of a run that is new or goes on. Its folder stays as it is, until `claim`.

    Raises:
        UserError: the data cannot be trained on, or the run folder holds a run of another configuration.
    """
    _require_writable(config.storage)
    config = config.model_copy(update={"data": with_embedded_data(config, say)})
    if config.train.patience and config.data.val is None:
        raise UserError("--train.patience looks at val/AP: it needs --data.val")
    return open_run(config, prepare_splits(config, say, map_chunks), started_at)


def open_run(config: TrainJobConfig, manifests: dict[str, Manifest], started_at: float) -> Job:
    """A run that is new or goes on, for data that is prepared.

    Raises:
        UserError: the run folder holds a run of another configuration, or no run.
    """
    run = Folder.at(config.storage, config.workers.storage_timeout_s) / config.name
    known = None
    if not config.overwrite:
        require_kind(run, "run.json")
        known = run.read_json("run.json") if run.exists("run.json") else None
    hashes = {split: manifest.hash for split, manifest in manifests.items()}
    resolved = _resolved(config, known)
    if known is not None and (lines := _changes(resolved, hashes, known)):
        if _has_trained(run):
            _refuse(lines, run, allowed=config.allow_changes)
        else:  # what ended before its first step claims nothing
            known, resolved = None, _resolved(config, None)
    return Job(resolved, manifests, known["run_id"] if known else secrets.token_hex(4), run, started_at)


def claim(job: Job) -> None:
    """Write down in the run folder what is trained: once all that can be wrong with it has been looked at."""
    if job.config.overwrite:
        job.run.delete()
    kept = job.config.model_copy(update={"overwrite": False, "allow_changes": False})  # of one start, not of the run
    facts = {"run_id": job.run_id, "data_hashes": job.facts.data_hashes, "config": kept.model_dump(mode="json")}
    job.run.write_text("config.yaml", to_yaml(kept))
    job.run.write_text("run.json", json.dumps(facts, indent=1))
    _keep_manifests(job.run, job.manifests)


def finished_summary(job: Job) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do."""
    if not job.run.exists("summary.json"):
        return None
    summary = job.run.read_json("summary.json")
    return summary if summary.get("epochs", 0) >= job.config.train.epochs else None


def with_embedded_data(config: TrainJobConfig, say: Callable[[str], None]) -> DatasetConfig:
    """The data section, on the embedded data set where none was named."""
    data = config.data
    if data.train is not None:
        return data
    if data.val or data.test:
        raise UserError("--data.val and --data.test need --data.train")
    folder = cache_folder(config.storage) / "embedded"
    say(f"no --data.train: training on the embedded data set, drawn at {folder}")
    paths = embedded.generate(folder, seed=0)
    return data.model_copy(update={split: str(path) for split, path in paths.items()})


def prepare_splits(config: TrainJobConfig, say: Callable[[str], None], map_chunks: MapChunks) -> dict[str, Manifest]:
    """The manifests by split, prepared or from the cache.

    Raises:
        UserError: the data cannot be trained on.
    """
    manifests: dict[str, Manifest] = {}
    for split in SPLITS:
        source = getattr(config.data, split)
        if source is None:
            continue
        cache = cache_folder(config.storage) / "manifests"
        data = config.data
        manifest, report = prepare(
            source,
            data.images,
            cache,
            split=split,
            selection=Selection(data.classes, data.rename),
            strict=data.strict,
            limits=data.limits,
            map_chunks=map_chunks,
        )
        say(f"{split}: {report.table() if report and report.notable else _one_line(source, manifest)}")
        manifests[split] = manifest
        if split == "train":
            require_trainable(manifest)
        else:
            same_classes(manifests["train"], manifest)
    if "val" in manifests and not manifests["val"].counts["trainable_boxes"]:
        say("warning: val has no object, so val/AP says nothing: the last weights will be the best ones")
    _check_twins(config, manifests, say)
    return manifests


def _check_twins(config: TrainJobConfig, manifests: dict[str, Manifest], say: Callable[[str], None]) -> None:
    """Say which images are in two splits, or refuse them as strict."""
    twins, path = find_twins(manifests, cache_folder(config.storage) / "manifests")
    if not twins:
        return
    text = f"{len(twins)} images are in two splits (for example {'; '.join(map(str, twins[:3]))}); listed in {path}"
    if config.data.strict:
        raise UserError(f"refused as strict: {text}")
    say(f"warning: {text}")


def _one_line(source: str, manifest: Manifest) -> str:
    counts = manifest.counts
    return (
        f"{source}: {counts['trainable_images']} of {counts['images']} images and {counts['trainable_boxes']} of "
        f"{counts['boxes']} boxes usable in training, {len(manifest.classes)} classes"
    )


def _resolved(config: TrainJobConfig, known: dict[str, Any] | None) -> TrainJobConfig:
    """With the micro-batch size written out, from the run that goes on: it must outlive a change of workers."""
    size = config.train.micro_batch_size
    if size is None and known is not None:
        size = known["config"]["train"]["micro_batch_size"]
    update = {"micro_batch_size": size or micro_batches(config.train, config.workers.most)[1]}
    config = config.model_copy(update={"train": config.train.model_copy(update=update)})
    try:
        micro_batches(config.train, config.workers.most)
    except ValueError as error:
        raise UserError(str(error)) from None
    return config


def _require_writable(storage: str) -> None:
    """Before minutes are spent on data; of an object store the first write tells."""
    folder = Folder.at(storage).local
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder, prefix=".writable_"):
                pass
    except OSError as error:
        raise UserError(f"--storage {storage} cannot be written: {reason(error)}") from None


def require_kind(folder: Folder, own: str) -> None:
    """Raises UserError: the folder holds something else than what has the file `own`."""
    for file, what in KINDS.items():
        if file != own and folder.exists(file):
            raise UserError(f"{folder.uri} holds a {what}: choose another --name, or --overwrite it")


def _has_trained(run: Folder) -> bool:
    return any(name == "metrics.jsonl" or name.startswith("checkpoint_") for name in run.names())


def _changes(config: TrainJobConfig, hashes: dict[str, str], known: dict[str, Any]) -> list[str]:
    """What is not as an earlier start had it, but for what may change."""
    new, old = config.model_dump(mode="json"), known["config"]
    try:  # fields that an earlier version did not have get their defaults
        old = TrainJobConfig.model_validate(old).model_dump(mode="json")
    except ValidationError:
        pass
    lines = [line for line in changed_keys(old, new) if not line.startswith(MAY_CHANGE)]
    if config.train.epochs > known["config"]["train"]["epochs"]:
        lines = [line for line in lines if not line.startswith("train.epochs:")]
    return lines + [f"data of {line}" for line in changed_keys(known["data_hashes"], hashes)]


def _refuse(lines: list[str], run: Folder, *, allowed: bool) -> None:
    fixed = [line for line in lines if line.startswith(FIXED)]
    if fixed:
        raise UserError(
            f"{run.uri} holds a run of another network or of other classes ({'; '.join(fixed)}): "
            "choose another --name, or --overwrite it"
        )
    if not allowed:
        raise UserError(
            f"{run.uri} holds a run with another configuration ({'; '.join(lines)}): "
            "choose another --name, or --overwrite it, or go on with --allow_changes"
        )


def _keep_manifests(run: Folder, manifests: dict[str, Manifest]) -> None:
    """In the run folder, where every node that sees the storage can read them."""
    with TemporaryDirectory() as scratch:
        local = run.local / "data" if run.local else Path(scratch)
        local.mkdir(parents=True, exist_ok=True)
        for split, manifest in manifests.items():
            write_manifest(manifest, local / f"{split}.parquet")
            if not run.local:
                run.upload(local / f"{split}.parquet", f"data/{split}.parquet")
