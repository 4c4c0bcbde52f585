"""`jobs/bench.py checkpoint` on its smallest case: what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_det.bench import checkpoint
from ray_det.types import UserError


@pytest.mark.usefixtures("threads")
def test_the_storage_keeps_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    kept = tmp_path / "bench" / "kept.txt"  # also the name of the run
    kept.parent.mkdir()
    kept.write_text("a run of someone's")
    model = {"name": "torchvision/fcos_mobilenet_v3_small_fpn", "fpn_channels": 32}
    asked = {"model": model, "image_size": 64, "steps": 1, "repeats": 1, "storage": str(tmp_path)}
    stall, whole = checkpoint.run(checkpoint.Config.model_validate(asked))
    assert 0 < stall.value and 0 < whole.value
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
    assert kept.read_text() == "a run of someone's"


def test_a_storage_that_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=f"--storage {file}: "):
        next(checkpoint.run(checkpoint.Config(storage=str(file))))
