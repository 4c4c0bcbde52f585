"""An image that is in two splits is found by its bytes, whatever its name, and only lookalikes are read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from ray_det.config import TrainJobConfig
from ray_det.data.headers import map_in_threads
from ray_det.data.manifest import Manifest
from ray_det.data.prepare import make
from ray_det.data.twins import Twin, find_twins
from ray_det.train.start import begin
from ray_det.types import UserError


@pytest.fixture
def mixed(small_coco: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The small data set, in which three files of val and test hold pictures of train, and one of val is in test."""
    folder = tmp_path / "coco"
    shutil.copytree(small_coco["train"].parent, folder)
    images = folder / "images"
    for source, target in (
        ("train_0003", "val_0002"), ("train_0003", "test_0001"), ("train_0005", "val_0004"), ("val_0006", "test_0005"),
    ):  # fmt: skip
        shutil.copy(images / f"{source}.jpg", images / f"{target}.jpg")
    paths = {split: folder / path.name for split, path in small_coco.items()}
    for path in paths.values():  # the copies are not of the sizes that the JSON says
        document = json.loads(path.read_text())
        document["images"] = [{"id": i["id"], "file_name": i["file_name"]} for i in document["images"]]
        document["annotations"] = [a | {"bbox": [1, 1, 9, 9]} for a in document["annotations"]]
        path.write_text(json.dumps(document))
    return paths


EXPECTED = [
    Twin("train", "train_0003.jpg", "val", "val_0002.jpg"),
    Twin("train", "train_0005.jpg", "val", "val_0004.jpg"),
    Twin("train", "train_0003.jpg", "test", "test_0001.jpg"),
    Twin("val", "val_0002.jpg", "test", "test_0001.jpg"),
    Twin("val", "val_0006.jpg", "test", "test_0005.jpg"),
]


def manifests(paths: dict[str, Path], root: str | None = None) -> dict[str, Manifest]:
    return {split: make(str(path), root)[0] for split, path in paths.items()}


def test_twins_are_found_in_every_two_splits_and_listed(mixed: dict[str, Path], tmp_path: Path) -> None:
    found, path = find_twins(manifests(mixed), tmp_path / "cache")
    assert found == EXPECTED
    assert json.loads(path.read_text())[0] == {
        "split": "train", "file": "train_0003.jpg", "other_split": "val", "other_file": "val_0002.jpg",
    }  # fmt: skip


def test_twins_are_found_under_a_uri(mixed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system of its own, as an object store is."""
    from ray_det.data import files

    store = fs.SubTreeFileSystem(str(mixed["train"].parent), fs.LocalFileSystem())
    monkeypatch.setattr(files, "_filesystem", lambda scheme, host: (store, host))
    assert find_twins(manifests(mixed, "store://images"), tmp_path / "cache")[0] == EXPECTED


def test_only_lookalikes_are_read_and_only_once(
    mixed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, read = manifests(mixed), []

    def spy(path: str, *limits: float | None) -> bytes:
        read.append(os.path.basename(path))
        return Path(path).read_bytes()

    monkeypatch.setattr("ray_det.data.files.read_bytes", spy)
    first, _ = find_twins(prepared, tmp_path / "cache")
    assert sorted(read) == sorted({name for twin in EXPECTED for name in (twin.file, twin.other_file)})
    read.clear()
    assert find_twins(prepared, tmp_path / "cache")[0] == first and read == []
    shutil.copy(mixed["train"].parent / "images" / "train_0001.jpg", mixed["train"].parent / "images" / "val_0001.jpg")
    assert len(find_twins(manifests(mixed), tmp_path / "cache")[0]) == len(EXPECTED) + 1 and read


def test_equal_length_alone_is_no_twin_and_a_lost_file_none(mixed: dict[str, Path], tmp_path: Path) -> None:
    images = mixed["train"].parent / "images"
    picture = bytearray((images / "val_0002.jpg").read_bytes())
    picture[-10] ^= 1
    (images / "val_0002.jpg").write_bytes(picture)
    prepared = manifests(mixed)
    (images / "train_0005.jpg").unlink()
    found, _ = find_twins(prepared, tmp_path / "cache")
    assert found == [EXPECTED[2], EXPECTED[4]]


def test_a_run_warns_or_refuses_and_says_nothing_where_there_is_none(
    mixed: dict[str, Path], small_coco: dict[str, Path], tmp_path: Path
) -> None:
    def said(paths: dict[str, Path], **data: Any) -> list[str]:
        lines: list[str] = []
        config = {"storage": str(tmp_path), "data": {k: str(v) for k, v in paths.items()} | data, "overwrite": True}
        begin(TrainJobConfig.model_validate(config), 0.0, lines.append, map_in_threads)
        return [line for line in lines if "two splits" in line]

    (line,) = said(mixed)
    assert line.startswith("warning: 5 images are in two splits (for example val_0002.jpg of val is train_0003.jpg of")
    assert Path(line.rsplit(" ", 1)[1]).is_file()
    with pytest.raises(UserError, match="refused as strict: 5 images are in two splits"):
        said(mixed, strict=True)
    assert said(small_coco, strict=True) == []
    assert said({"train": mixed["train"]}) == []
