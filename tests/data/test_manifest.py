"""The manifest keeps its content through a file, its hash through a move, and pycocotools' numbers to the bit."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ray_det.data import coco
from ray_det.data.headers import Header
from ray_det.data.manifest import SCHEMA, Manifest, build, content_hash, read_manifest, write_manifest
from ray_det.data.preflight import inspect
from ray_det.data.prepare import make
from ray_det.data.truth import ground_truth
from ray_det.types import UserError

REAL = os.environ.get("RAY_DET_REAL_DATA")
NAN = float("nan")


def messy() -> dict[str, Any]:
    """All that pycocotools lives with: crowds, defects, gaps, repeated and unknown ids, no boxes."""
    rng = np.random.default_rng(0)
    images = [{"id": int(i), "file_name": f"{i}.jpg", "height": 200, "width": 300} for i in (5, 3, 900, 8, 4, 77)]
    annotations = [
        {
            "id": k,
            "image_id": int(rng.choice([5, 3, 900, 8])),
            "category_id": int(rng.choice([1, 2, 40])),
            "bbox": [float(v) for v in (*rng.uniform(0, 150, 2), *rng.uniform(1, 140, 2))],
            "area": float(rng.uniform(10, 20000)),
            "iscrowd": int(rng.random() < 0.1),
        }
        for k in range(60)  # 0 is an id too
    ]
    annotations[7]["bbox"] = [10, 10, 0, 0]
    annotations[8]["bbox"] = [10, 10, -5, 8]
    annotations[9]["bbox"] = [NAN, 10, 5, 8]
    annotations[10]["bbox"] = [290, 190, 50, 50]
    annotations[11]["area"] = NAN
    annotations[12]["category_id"] = 41  # unknown
    annotations[13]["image_id"] = 6  # unknown
    annotations[40] |= {"id": 20, "image_id": 5}  # the last of two with one id counts, in the order of the file
    annotations[20] |= {"image_id": 8}
    images.append(images[1] | {"file_name": "again.jpg"})
    categories = [{"id": i, "name": f"c{i}"} for i in (40, 1, 2)]
    return {"images": images, "annotations": annotations, "categories": categories}


def manifest_of(document: dict[str, Any], root: str = "/data", source: str = "x.json") -> Manifest:
    """With made-up headers: "4.jpg" is missing."""

    def map_chunks(_: Any, chunks: list) -> list[list[Header]]:
        missing = Header("missing", problem="no such file")
        return [[missing if n == "4.jpg" else Header("ok", 200, 300) for n in names] for _, names in chunks]

    return build(inspect(coco.parse(json.dumps(document).encode(), source), root, map_chunks)[0], root)


def evaluate(document: dict[str, Any], detections: list[dict[str, Any]]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        truth.dataset = copy.deepcopy(document)
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def noisy_detections(document: dict[str, Any]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    images = {i["id"] for i in document["images"]}
    found = [a for a in document["annotations"] if a["image_id"] in images and np.isfinite(a["bbox"]).all()]
    return [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": (np.array(a["bbox"]) + rng.normal(0, 3, 4)).tolist(),
            "score": float(rng.random()),
        }
        for a in found + found[::2]
    ]


def assert_same_numbers(document: dict[str, Any], other: dict[str, Any]) -> None:
    detections = noisy_detections(document)
    a, b = evaluate(document, detections), evaluate(other, detections)
    assert a.stats[1] > 0.1  # there is something to compare
    np.testing.assert_array_equal(a.stats, b.stats)
    for key in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(a.eval[key], b.eval[key])


def test_pycocotools_sees_no_difference() -> None:
    document = messy()
    assert_same_numbers(document, ground_truth(manifest_of(document)))


def test_pycocotools_sees_no_difference_after_a_file(tmp_path: Path) -> None:
    document = messy()
    write_manifest(manifest_of(document), tmp_path / "m.parquet")
    assert_same_numbers(document, ground_truth(read_manifest(tmp_path / "m.parquet")))


@pytest.mark.skipif(not REAL, reason="RAY_DET_REAL_DATA names no folder")
@pytest.mark.parametrize("split", ["bccd/val", "coco_cc/train", "coco_cc/val", "coco_cc/test"])
def test_pycocotools_sees_no_difference_on_photographs(split: str) -> None:
    source = Path(str(REAL)) / f"{split}.json"
    manifest, _ = make(str(source), None)
    assert_same_numbers(json.loads(source.read_text()), ground_truth(manifest))


def test_rows_hold_what_the_json_says() -> None:
    document = messy()
    table = manifest_of(document).table
    assert table.schema.equals(SCHEMA)
    assert table["image_id"].to_pylist() == [5, 3, 900, 8, 4, 77]
    row = table.to_pylist()[3]
    mine = [a for a in document["annotations"] if a["image_id"] == 8 and a["category_id"] != 41]
    assert row["annotation_ids"] == [a["id"] for a in mine]
    assert row["boxes"] == [a["bbox"] for a in mine]
    assert row["labels"] == [[1, 2, 40].index(a["category_id"]) for a in mine]
    assert row["area"] == [a["area"] for a in mine]
    assert row["iscrowd"] == [a["iscrowd"] for a in mine]
    assert table["boxes"][5].as_py() == []


def test_file_keeps_everything(tmp_path: Path) -> None:
    manifest = manifest_of(messy())
    write_manifest(manifest, tmp_path / "new" / "m.parquet")
    again = read_manifest(tmp_path / "new" / "m.parquet")
    assert again.table.slice(3, 2).to_pylist() == manifest.table.slice(3, 2).to_pylist()
    assert (again.classes, again.root, again.source, again.hash, again.counts) == (
        manifest.classes, "/data", "x.json", manifest.hash, manifest.counts,
    )  # fmt: skip
    assert len(again) == 6
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.parquet"]  # no temporary file stays


def test_hash_follows_content_alone() -> None:
    document = messy()
    same = manifest_of(document, "s3://bucket/elsewhere", "/other/y.json")
    hashes = {manifest_of(document).hash, same.hash}
    assert len(hashes) == 1
    changes = [
        ("annotations", 0, "bbox", [1, 2, 3, 4]),
        ("annotations", 0, "area", 1),
        ("annotations", 0, "iscrowd", 1),
        ("annotations", 0, "category_id", 2 if document["annotations"][0]["category_id"] != 2 else 1),
        ("annotations", 0, "image_id", 77),
        ("annotations", 0, "id", 1000),
        ("images", 0, "file_name", "z.jpg"),
        ("images", 4, "height", 201),
        ("categories", 0, "name", "else"),
    ]
    for group, index, key, value in changes:
        changed = copy.deepcopy(document)
        changed[group][index][key] = value
        hashes.add(manifest_of(changed).hash)
    assert len(hashes) == 1 + len(changes)


def test_hash_knows_whose_box_it_is() -> None:
    """Moved to the next image, a box leaves every column as it is but for the lengths of the lists."""
    images = messy()["images"][:2]
    box = {"id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    hashes = {
        manifest_of(messy() | {"images": images, "annotations": [box | {"image_id": i["id"]}]}).hash for i in images
    }
    assert len(hashes) == 2


def test_hash_does_not_depend_on_how_arrow_lays_it_out(tmp_path: Path) -> None:
    manifest = manifest_of(messy())
    halves = pa.concat_tables([manifest.table.slice(0, 2), manifest.table.slice(2)])
    write_manifest(replace(manifest, table=halves), tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet").hash == manifest.hash  # recomputed and compared on reading


def test_uri_joins_root_and_name() -> None:
    manifest = manifest_of(messy())
    assert manifest.uri(2) == "/data/900.jpg"
    assert replace(manifest, root="s3://bucket/x/").uri(0) == "s3://bucket/x/5.jpg"


def test_a_file_root_is_a_path_so_that_links_out_of_it_are_seen(tmp_path: Path) -> None:
    write_manifest(replace(manifest_of(messy()), root="file:///data"), tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet").root == "/data"


@pytest.mark.parametrize("name", ["/a/b.jpg", "../b.jpg", "a/../../b.jpg", "gs://c/d.jpg", "a\\b.jpg", "a\0.jpg"])
def test_a_file_whose_names_leave_its_root_is_refused(tmp_path: Path, name: str) -> None:
    """Given as --data.train it passes no preflight."""
    document = messy()
    document["images"] = [{"id": 1, "file_name": "INNOCENT.jpg"}]
    manifest = manifest_of(document)
    table = manifest.table.set_column(1, SCHEMA.field("uri"), pa.array([name]))
    hostile = replace(manifest, table=table, hash=content_hash(table, manifest.classes))
    write_manifest(hostile, tmp_path / "m.parquet")
    with pytest.raises(UserError, match="is refused: it") as caught:
        read_manifest(tmp_path / "m.parquet")
    assert repr(name) in str(caught.value) and "/data" in str(caught.value)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with pytest.raises(UserError, match=f"no such file: {path}"):
        read_manifest(path)
    write_manifest(manifest_of(messy()), path)
    whole = path.read_bytes()
    for content in (
        b"",
        b"PAR1",
        b"no parquet at all",
        whole[:-20],
        whole[: len(whole) // 2],
        whole[len(whole) // 2 :],
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"m\.parquet") as caught:
            read_manifest(path)
        assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UserError, match=r"m\.parquet is not a manifest"):
        read_manifest(path)


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    manifest = manifest_of(messy())
    column = manifest.table.schema.get_field_index("height")
    wrong = manifest.table.set_column(column, SCHEMA.field("height"), pa.array([1] * 6, pa.int32()))
    write_manifest(replace(manifest, table=wrong), path)
    with pytest.raises(UserError, match=r"m\.parquet is a damaged manifest"):
        read_manifest(path)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.parquet"
    manifest = manifest_of(messy())
    write_manifest(manifest, path)

    def fail(_: Any, where: Path) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_manifest(manifest, path)
    assert read_manifest(path).hash == manifest.hash
    assert list(tmp_path.iterdir()) == [path]


def test_data_set_without_any_box(tmp_path: Path) -> None:
    document = messy() | {"annotations": [], "images": [{"id": 1, "file_name": "a.jpg"}]}
    manifest = manifest_of(document)
    write_manifest(manifest, tmp_path / "m.parquet")
    again = read_manifest(tmp_path / "m.parquet")
    assert again.counts == {"images": 1, "boxes": 0, "trainable_images": 1, "trainable_boxes": 0}
    assert ground_truth(again)["annotations"] == []
