"""Packed images give the same micro-batches as files of their own, and a shard that is not what it was is named."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Timer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_det.config import AugmentConfig, DatasetConfig, TrainJobConfig
from ray_det.data.collate import LoadSpec, Shard, load
from ray_det.data.headers import map_in_threads
from ray_det.data.manifest import SCHEMA, Manifest, read_manifest, write_manifest
from ray_det.data.pack import pack
from ray_det.data.plan import Assignment, plan_epoch, plan_evaluation
from ray_det.data.prepare import make
from ray_det.data.twins import find_twins
from ray_det.train.start import begin, claim
from ray_det.types import MicroBatch, UserError
from tests.data.test_collate import same
from tests.jobs.run import run_job
from tests.s3 import S3Server

SHARD = 50_000
CONFIG = DatasetConfig(image_size=96)


@pytest.fixture
def folder(small_coco: dict[str, Path], tmp_path: Path) -> Path:
    """The small data set, with a file that is gone and one that is no image."""
    folder = tmp_path / "coco"
    shutil.copytree(small_coco["train"].parent, folder)
    (folder / "images" / "train_0002.jpg").unlink()
    (folder / "images" / "train_0005.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture
def plain(folder: Path) -> Manifest:
    return make(str(folder / "train.json"), None)[0]


def assignments(manifest: Manifest) -> list[tuple[Assignment, LoadSpec]]:
    """A whole epoch with augmentation, and an evaluation of every readable image."""
    table = manifest.table
    h, w = table["height"].to_numpy(), table["width"].to_numpy()
    train, readable = (np.flatnonzero(table[name].to_numpy()) for name in ("trainable", "readable"))
    epoch = plan_epoch(
        h[train], w[train], train, CONFIG, micro_batches=2, micro_batch_size=2, divisor=32, seed=3, epoch=1
    )
    whole = plan_evaluation(h[readable], w[readable], readable, CONFIG, batch_size=4, divisor=32, rank=0, world=1)
    spec = LoadSpec("longest", "mean", seed=3, augment=AugmentConfig(mosaic=0.5, mixup=0.2))
    return [(epoch.assign(0, 1), spec), (whole, replace(spec, augment=None))]


def batches(manifest: Manifest) -> list[MicroBatch]:
    return [batch for plan, spec in assignments(manifest) for batch in load(Shard(manifest, plan, spec))]


def assert_same(ours: list[MicroBatch], theirs: list[MicroBatch]) -> None:
    assert len(ours) == len(theirs) > 6
    for a, b in zip(ours, theirs, strict=True):
        same(a, b)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_same_micro_batches_from_the_shards_alone(plain: Manifest, folder: Path, tmp_path: Path, scheme: str) -> None:
    expected = batches(plain)
    packed = pack(plain, f"{scheme}{tmp_path}/shards", SHARD)
    write_manifest(packed, f"{scheme}{tmp_path}/out/m.parquet")
    shutil.rmtree(folder)
    again = read_manifest(f"{scheme}{tmp_path}/out/m.parquet")
    assert again.hash == plain.hash and again.shards == f"{tmp_path}/shards"
    assert_same(batches(again), expected)
    assert len(list((tmp_path / "shards").glob("shard-*-0000?.bin"))) > 2
    assert again.table["uri"].equals(plain.table["uri"])


def test_same_micro_batches_from_shards_on_s3(plain: Manifest, folder: Path, tmp_path: Path, s3: S3Server) -> None:
    """In spite of an outage while they are read."""
    expected = batches(plain)
    packed = pack(plain, f"s3://bucket/{tmp_path.name}/shards", SHARD)
    write_manifest(packed, f"s3://bucket/{tmp_path.name}/m.parquet")
    again = read_manifest(f"s3://bucket/{tmp_path.name}/m.parquet")
    assert again.shards == f"s3://bucket/{tmp_path.name}/shards" and again.hash == plain.hash
    shutil.rmtree(folder)
    s3.freeze()
    Timer(1, s3.thaw).start()
    assert_same(batches(again), expected)


def test_pieces_are_the_files_and_unreadable_images_have_none(plain: Manifest, folder: Path, tmp_path: Path) -> None:
    packed = pack(plain, str(tmp_path / "shards"), SHARD)
    sizes = []
    for row, record in enumerate(packed.table.to_pylist()):
        if record["uri"] in ("train_0002.jpg", "train_0005.jpg"):
            assert [record[name] for name in ("shard", "offset", "length", "trainable")] == [None, None, None, False]
            continue
        content = (folder / "images" / record["uri"]).read_bytes()
        whole = (tmp_path / "shards" / record["shard"]).read_bytes()
        assert whole[record["offset"] : record["offset"] + record["length"]] == content == packed.place(row).read()
        sizes.append((len(whole), len(content)))
    assert all(whole <= SHARD or whole == piece for whole, piece in sizes)
    alone = pack(plain, str(tmp_path / "alone"), 1)  # every image is larger than a shard
    assert len(list((tmp_path / "alone").iterdir())) == len(sizes) == len(alone.table["shard"].unique()) - 1


def test_packing_goes_on_where_it_stopped(plain: Manifest, folder: Path, tmp_path: Path) -> None:
    images, shards = folder / "images", tmp_path / "shards"
    last = images / "train_0016.jpg"
    last.rename(folder / "away.jpg")
    last.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"no such file: .*train_0016\.jpg"):
        pack(plain, str(shards), SHARD)
    last.unlink()
    (folder / "away.jpg").rename(last)
    first = pack(plain, str(shards), SHARD)
    whole = {path.name: path.read_bytes() for path in shards.iterdir()}
    names = sorted(whole)
    (shards / names[0]).write_bytes(whole[names[0]][:-5])
    for path in shards.iterdir():
        os.utime(path, ns=(1, 1))
    (shards / names[1]).unlink()
    again = pack(plain, str(shards), SHARD)
    assert again.table.equals(first.table)
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == whole
    assert sorted(path.name for path in shards.iterdir() if path.stat().st_mtime_ns != 1) == names[:2]


def test_shards_of_other_images_are_left_alone(plain: Manifest, folder: Path, tmp_path: Path) -> None:
    first = pack(plain, str(tmp_path / "shards"), SHARD)
    expected = first.place(0).read()
    shutil.copy(folder / "images" / "train_0001.jpg", folder / "images" / "copy.jpg")
    (folder / "images" / "train_0001.jpg").write_bytes(expected[::-1])  # the same length, other bytes
    second = pack(plain, str(tmp_path / "shards"), SHARD)
    assert (first.place(0).read(), second.place(0).read()) == (expected, expected[::-1])


def test_image_that_changes_meanwhile_leaves_no_shard(
    plain: Manifest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_det.data import files

    stats = files.stats

    def then_change(root: str, names: list[str]) -> list[files.Stat | None]:
        found = stats(root, names)
        (folder / "images" / "train_0001.jpg").write_bytes(b"shorter")
        return found

    monkeypatch.setattr(files, "stats", then_change)
    with pytest.raises(UserError, match=r"image .*train_0001\.jpg changed while it was packed"):
        pack(plain, str(tmp_path / "shards"), SHARD)
    assert list((tmp_path / "shards").iterdir()) == []


def test_damage_is_named(plain: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with pytest.raises(UserError, match="is packed already, under"):
        pack(replace(plain, shards="s3://b/x"), str(tmp_path), SHARD)
    packed = pack(plain, str(tmp_path / "shards"), SHARD)
    offsets = packed.table["offset"].to_pylist()
    wrong = pa.array([offset and offset + 7 for offset in offsets], pa.int64())
    moved = packed.table.set_column(SCHEMA.get_field_index("offset"), SCHEMA.field("offset"), wrong)
    plan, spec = assignments(packed)[1]
    with pytest.raises(
        UserError, match=r"train_00\d\d\.jpg \(byte \d+ of .*\.bin\)|\.bin is damaged: it ends before byte"
    ):
        load(Shard(replace(packed, table=moved), plan, spec))
    write_manifest(packed, path)
    content = pq.read_table(path)
    pq.write_table(moved.replace_schema_metadata(content.schema.metadata), path)
    with pytest.raises(UserError, match=r"m\.parquet is a damaged manifest"):
        read_manifest(path)
    for name in (tmp_path / "shards").iterdir():
        name.write_bytes(name.read_bytes()[:-1])
    elsewhere = tmp_path / "elsewhere"  # files that this process has open stay what they were
    (tmp_path / "shards").rename(elsewhere)
    with pytest.raises(UserError, match=r"elsewhere/shard-.*\.bin is damaged: it ends before byte"):
        load(Shard(replace(packed, shards=str(elsewhere)), plan, spec))
    with pytest.raises(UserError, match=r"no such file: .*/gone/shard-.*\.bin"):
        load(Shard(replace(packed, shards=str(tmp_path / "gone")), plan, spec))


def test_the_job_packs_and_a_run_moves_to_the_shards(folder: Path, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out"
    arguments = ("--source", folder / "train.json", "--output", f"file://{out}", "--pack", shards, "--pack_mb", 1)
    assert run_job("prepare", *arguments) == 0
    assert sorted(p.name for p in out.iterdir()) == ["manifest.parquet", "preflight.json"]
    assert json.loads((out / "preflight.json").read_text())["counts"]["missing_file"] == 1
    manifest = read_manifest(out / "manifest.parquet")
    assert manifest.shards == str(shards) and len(list(shards.iterdir())) == 1

    def run(train: Path) -> Manifest:
        data = {"train": str(train), "val": str(folder / "val.json")}
        config = {"storage": str(tmp_path), "name": "run", "data": data}
        job = begin(TrainJobConfig.model_validate(config), 0.0, lambda text: None, map_in_threads)
        claim(job)
        (tmp_path / "run" / "metrics.jsonl").touch()  # a run with a step behind it
        return job.manifests["train"]

    assert run(folder / "train.json").shards is None
    assert run(out / "manifest.parquet").shards == str(shards)
    assert read_manifest(tmp_path / "run" / "data" / "train.parquet").shards == str(shards)
    with pytest.raises(UserError, match="data of train: "):
        run(folder / "test.json")


def test_twins_are_found_in_shards(plain: Manifest, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "images" / "train_0003.jpg", folder / "images" / "val_0001.jpg")
    val, _ = make(str(folder / "val.json"), None)
    splits = {"train": plain, "val": val}
    packed = {split: pack(manifest, str(tmp_path / split), SHARD) for split, manifest in splits.items()}
    shutil.rmtree(folder)
    assert [twin.other_file for twin in find_twins(packed, tmp_path)[0]] == ["val_0001.jpg"]
