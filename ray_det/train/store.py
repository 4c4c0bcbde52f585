"""The checkpoints in a run folder: kept whole, the newest whole one found again, on local disks and object stores.

They do not go through `ray.train.report`: its manager must be polled before a checkpoint counts, and fails the run
where the storage is out of reach for a moment. Here a checkpoint counts from the moment that its folder is complete.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ray_det.storage import Folder
from ray_det.train.checkpoint import LAST_FILE, Checkpoint
from ray_det.types import UserError

log = logging.getLogger(__name__)

KEPT = 2
BROKEN = "broken.txt"
"""In a checkpoint's folder: why it is passed over from now on. Those made after it may be of an earlier step."""
PHASES = ("train", "validate", "test")  # in the order of a step's checkpoints


def name_of(global_step: int, phase: str) -> str:
    return f"checkpoint_{global_step:08d}_{phase}"


def keep(run: Folder, staged: Path, name: str, *, validating: bool = False) -> None:
    """Move a staged checkpoint into the run folder, and delete all but the newest whole ones.

    Args:
        validating: the one at whose validation, in the background, the oldest of them may stand, is kept too.

    Raises:
        StorageError: the storage stayed out of reach, or full.
    """
    run.replace(staged, name, last=LAST_FILE)
    whole = 0
    for known in _names(run):
        if whole < KEPT:
            whole += _usable(run, known)
        elif validating and known.endswith("_validate") and _usable(run, known):
            validating = False
        else:
            (run / known).delete()


@contextmanager
def newest(run: Folder, before: int | None = None, *, mark: bool = True) -> Iterator[Checkpoint | None]:
    """The newest whole checkpoint, None where there is none at all; broken ones are passed over.

    Args:
        before: pass over those of this global step and later, too: they lead to numbers that are not finite. None is
            left then where the rest is none.
        mark: whether to say so and to mark them. One process of a run does it.

    Raises:
        UserError: there are checkpoints, and all of them are broken.
        StorageError: the storage stayed out of reach.
    """
    problems: dict[str, str] = {}
    broken = False
    for name in _names(run):
        if not _usable(run, name):
            continue
        with local_copy(run, name) as folder:
            try:
                checkpoint = Checkpoint.open(folder)
            except UserError as error:
                broken, problems[name] = True, str(error).replace(str(folder), f"{run.uri}/{name}")
                continue
            if before is not None and checkpoint.state.global_step >= before:
                problems[name] = f"{run.uri}/{name} leads to numbers that are not finite"
                continue
            _pass_over(run, problems if mark else {})
            yield checkpoint
            return
    if broken:
        raise UserError("; ".join(problems.values()))
    _pass_over(run, problems if mark else {})
    yield None


def _pass_over(run: Folder, problems: dict[str, str]) -> None:
    """From now on, those that have a problem."""
    for name, problem in problems.items():
        log.warning("%s: using the one before", problem)
        run.write_text(f"{name}/{BROKEN}", problem)


def _usable(run: Folder, name: str) -> bool:
    """Neither marked as broken nor an upload that was cut off."""
    return run.exists(f"{name}/{LAST_FILE}") and not run.exists(f"{name}/{BROKEN}")


@contextmanager
def local_copy(run: Folder, name: str) -> Iterator[Path]:
    """A folder of the run on the local disk."""
    if run.local:
        yield run.local / name
        return
    with TemporaryDirectory(prefix="ray_det_") as temporary:
        run.download(Path(temporary) / name, name)
        yield Path(temporary) / name


def _names(run: Folder) -> list[str]:
    """Of checkpoints, newest first."""
    found = []
    for name in run.names():
        if match := re.fullmatch(rf"checkpoint_(\d+)_({'|'.join(PHASES)})", name):
            found.append((int(match[1]), PHASES.index(match[2]), name))
    return [name for _, _, name in sorted(found, reverse=True)]
