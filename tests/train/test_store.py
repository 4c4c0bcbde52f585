"""Which checkpoints of a run folder are kept, and which one is found again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_det.storage import Folder
from ray_det.train import store
from ray_det.types import UserError
from tests.train.disturb import config
from tests.train.runner import run_alone


@pytest.fixture(scope="module")
def made(small_coco, tmp_path_factory) -> Path:
    """A folder of real checkpoints."""
    asked: dict[str, Any] = config(small_coco, tmp_path_factory.mktemp("made")) | {"wandb": {"mode": "disabled"}}
    asked["train"]["epochs"] = 1
    return run_alone({"config": asked, "world": 1}) / "kept"


def keep(run: Folder, made: Path, step: int) -> None:
    staged = Path(run.uri) / "staging"
    shutil.copytree(made / "checkpoint_00000005_train", staged)
    store.keep(run, staged, store.name_of(step, "train"))


def names(run: Folder) -> list[str]:
    return [name for name in run.names() if name.startswith("checkpoint_")]


def test_broken_ones_do_not_count_among_those_kept(made, tmp_path):
    run = Folder.at(str(tmp_path))
    for step in (10, 20, 30):
        keep(run, made, step)
    assert names(run) == [store.name_of(step, "train") for step in (20, 30)]
    (tmp_path / store.name_of(30, "train") / "model.safetensors").write_bytes(b"broken")
    with store.newest(run) as found:
        assert found and found.folder.name == store.name_of(20, "train")
    keep(run, made, 25)
    assert names(run) == [store.name_of(step, "train") for step in (20, 25, 30)]
    with store.newest(run) as found:
        assert found and found.folder.name == store.name_of(25, "train")


def test_an_upload_that_was_cut_off_is_no_checkpoint(made, tmp_path):
    run = Folder.at(str(tmp_path))
    shutil.copytree(made / "checkpoint_00000005_train", tmp_path / store.name_of(5, "train"))
    (tmp_path / store.name_of(5, "train") / "state.json").unlink()
    with store.newest(run) as found:
        assert found is None
    for step in (1, 2):
        keep(run, made, step)
    assert names(run) == [store.name_of(step, "train") for step in (1, 2, 5)]


@pytest.mark.parametrize("validating", [False, True])
def test_a_checkpoint_that_is_being_validated_stays_as_long_as_one_that_knows_of_it(validating, made, tmp_path):
    run = Folder.at(str(tmp_path))
    for step, phase in ((5, "validate"), (10, "train"), (16, "validate"), (20, "train"), (25, "train"), (30, "train")):
        staged = tmp_path / "staging"
        shutil.copytree(made / "checkpoint_00000005_train", staged)
        store.keep(run, staged, store.name_of(step, phase), validating=validating)
    expected = [store.name_of(step, "train") for step in (25, 30)]
    assert names(run) == [store.name_of(16, "validate")] * validating + expected


def test_where_all_lead_to_numbers_that_are_not_finite_the_run_begins_anew(made, tmp_path):
    """And goes on from none of them later, when those of the new beginning are of earlier steps."""
    run = Folder.at(str(tmp_path))
    keep(run, made, 5)
    with store.newest(run, before=5) as found:
        assert found is None
    with store.newest(run) as found:
        assert found is None
    keep(run, made, 3)
    with store.newest(run) as found:
        assert found and found.folder.name == store.name_of(3, "train")


def test_broken_checkpoints_alone_are_no_reason_to_begin_anew(made, tmp_path):
    run = Folder.at(str(tmp_path))
    for step in (5, 8):
        keep(run, made, step)
    (tmp_path / store.name_of(5, "train") / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="SHA-256 differs"), store.newest(run, before=5):
        pass
