"""Images that could not be loaded and are blank in their place (`data.on_bad_image: skip`): listed, told, limited."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace

import pyarrow.compute as pc

from ray_det.evaluate.gather import from_main, gather_lists
from ray_det.evaluate.split import readable_rows
from ray_det.report.metrics_file import MetricsFile, read_records
from ray_det.train.session import Session
from ray_det.types import MicroBatch, TrainingError

LIST = "skipped_images.jsonl"

Skipped = tuple[int, str]
"""(image id, reason)"""


def skipped_in(batches: Iterable[MicroBatch]) -> list[Skipped]:
    """The images of micro-batches that were skipped."""
    return [
        (int(image_id), why)
        for batch in batches
        if batch.skipped_B
        for image_id, why in zip(batch.image_ids_B, batch.skipped_B, strict=True)
        if why
    ]


def note_in_training(session: Session, mine: list[MicroBatch]) -> None:
    """Count and list what any rank skipped in the step that was just done; all ranks call it.

    Partners that are missing from the pictures of other images (in a mosaic) are listed, but not counted: how often an
    image is a partner says nothing of how many are broken.

    Raises:
        TrainingError: it is too much of all images so far, or of one epoch's where these are more.
    """
    step = session.state.global_step
    _note(session, "train", [lost for batch in mine for lost in batch.skipped_partners], step)
    found = _note(session, "train", skipped_in(mine), step)
    count = session.state.skipped_images + len(found)
    session.state = replace(session.state, skipped_images=count)
    seen = session.state.global_step * session.config.train.global_batch_size
    epoch = session.job.manifests["train"].counts["trainable_images"]
    _require_few(session, "training", count, max(seen, epoch), found)


def note_in_evaluation(session: Session, split: str, mine: list[Skipped], global_step: int) -> None:
    """List what any rank skipped in the evaluation of the weights of a step; all ranks call it.

    Raises:
        TrainingError: it is too much of the split: its metrics would say little.
    """
    found = _note(session, split, mine, global_step)
    _require_few(session, split, len(found), len(readable_rows(session.job.manifests[split])), found)


def _note(session: Session, split: str, mine: list[Skipped], global_step: int) -> list[Skipped]:
    """What all ranks skipped, on all ranks. Rank 0 lists it, once also where a step is done again after a restart."""
    group = session.runtime.group
    found = sorted(from_main(gather_lists(mine, group), group) or [])
    if not found or not session.runtime.is_main:
        return found
    path, table = session.runtime.folder / LIST, session.job.manifests[split].table
    file = MetricsFile(path, sys.maxsize)  # every whole line stays
    known = list(read_records(path))
    told = {(record["split"], record["image_id"]) for record in known}
    for image_id, why in found:
        name = table["uri"][pc.index(table["image_id"], image_id).as_py()].as_py()
        record = {"split": split, "file": name, "image_id": image_id, "reason": why}
        if {"global_step": global_step} | record not in known:
            file.append(global_step, record)
        if (split, image_id) not in told:
            session.runtime.notify({"message": f"{why}; a blank image takes its place in {split}"})
    file.close()
    return found


def _require_few(session: Session, where: str, count: int, images: int, found: list[Skipped]) -> None:
    limit = session.config.data.max_skipped_share
    if count > limit * images:
        raise TrainingError(
            f"{count} of {images} images of {where} could not be loaded, more than data.max_skipped_share {limit:g}; "
            f"the last is {found[-1][1]}; all are listed in {session.job.run.uri}/{LIST}"
        )
