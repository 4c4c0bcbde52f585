"""What `--input` may be, as lists of images in shards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_det.data.manifest import write_manifest
from ray_det.data.pack import pack
from ray_det.data.prepare import make
from ray_det.predict.inputs import InputImage, Inputs, _fits
from ray_det.predict.parquet_inputs import read_inputs
from ray_det.types import UserError


def read(
    source: object, ids_from: Path | None = None, shard_images: int | None = None, output: object = "/none"
) -> Inputs:
    return read_inputs(str(source), None if ids_from is None else str(ids_from), shard_images, str(output))


def images(inputs: Inputs) -> list[InputImage]:
    found = [image for shard in inputs.shards for image in inputs.read(shard)]
    assert len(found) == inputs.images == sum(inputs.counts)
    return found


def content(image: InputImage, max_bytes: int = 1 << 20) -> bytes:
    return image.read(max_bytes, 0.0)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*g"))


def test_a_folder_is_searched_in_depth_but_for_the_output_in_it(photos):
    wanted = names(photos)
    (photos / "out").mkdir()
    (photos / "out" / "1.jpg").write_bytes(b"drawn")
    (photos / "notes.txt").write_text("no image")
    found = images(read(photos, output=photos / "out"))
    assert [image.name for image in found] == wanted and "deep" in wanted[1]
    assert [image.id for image in found] == list(range(1, 10))
    assert [content(image) for image in found] == [(photos / name).read_bytes() for name in wanted]
    with pytest.raises(UserError, match="more than max_bytes 10"):
        content(found[0], 10)


@pytest.mark.parametrize(
    ("pattern", "count"), [("*.jpg", 7), ("**/*.jpg", 8), ("*/*.jpg", 1), ("cut.jpg", 1), ("[ct]*.*g", 2)]
)
def test_globs(photos, pattern, count):
    assert len(images(read(photos / pattern))) == count
    assert sum(_fits(name.split("/"), pattern.split("/")) for name in names(photos)) == count  # as for URIs


def test_shards_hold_all_in_order_whatever_their_size(photos):
    whole = [image[:2] for image in images(read(photos))]
    for size in (1, 4, 9, 100):
        inputs = read(photos, shard_images=size)
        assert [image[:2] for image in images(inputs)] == whole
        assert max(inputs.counts) <= size and len(inputs.shards) == -(-9 // size)


def test_the_digest_tells_a_changed_input(photos):
    digests = {read(photos).digest}
    os.utime(photos / "cut.jpg", ns=(0, 0))
    digests.add(read(photos).digest)
    (photos / "more.jpg").write_bytes(b"new")
    digests.add(read(photos).digest)
    ids = {"images": [{"id": i, "file_name": n} for i, n in enumerate(names(photos))]} | {"annotations": []}
    (photos / "ids.json").write_text(json.dumps(ids | {"categories": [{"id": 1, "name": "a"}]}))
    digests.add(read(photos, ids_from=photos / "ids.json").digest)
    assert len(digests) == 4
    assert read(photos).digest in digests


def test_ids_come_from_a_coco_json(photos, tmp_path):
    entries = [{"id": 100 - i, "file_name": name} for i, name in enumerate(names(photos))]
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"images": entries, "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    assert [image.id for image in images(read(photos, ids_from=path))] == list(range(100, 91, -1))
    path.write_text(json.dumps({"images": entries[1:], "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    with pytest.raises(UserError, match="cut.jpg is not among the images of"):
        read(photos, ids_from=path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_manifest_gives_its_own_ids_and_bytes(small_coco, tmp_path, packed):
    manifest, _ = make(str(small_coco["val"]), None)
    entries = json.loads(small_coco["val"].read_text())["images"]
    if packed:
        manifest = pack(manifest, str(tmp_path / "packed"), 1 << 16)
        assert manifest.table["shard"].null_count == 0
    write_manifest(manifest, tmp_path / "manifest.parquet")
    found = images(read(tmp_path / "manifest.parquet", shard_images=3))
    assert [(image.id, image.name) for image in found] == [(e["id"], e["file_name"]) for e in entries]
    folder = small_coco["val"].parent / "images"
    assert [content(image) for image in found] == [(folder / e["file_name"]).read_bytes() for e in entries]


@pytest.mark.parametrize("column", ["uri", "path", "file_name"])
def test_a_column_of_paths_relative_absolute_or_null(photos, tmp_path, column):
    (tmp_path / "a.jpg").write_bytes(b"beside")
    (tmp_path / "a é%20#.jpg").write_bytes((photos / "cut.jpg").read_bytes())
    listed = ["a.jpg", str(photos / "cut.jpg"), (tmp_path / "a é%20#.jpg").as_uri(), None, "../a.jpg", "gone.jpg"]
    table = pa.table({column: listed, "image_id": pa.array([5, 3, 4, 1, 2, 9], pa.int32())})
    pq.write_table(table, tmp_path / "list.parquet")
    found = images(read(tmp_path / "list.parquet"))
    assert [image.id for image in found] == [5, 3, 4, 1, 2, 9]
    assert content(found[0]) == b"beside" and found[0].name == "a.jpg"
    assert content(found[1]) == content(found[2]) == (photos / "cut.jpg").read_bytes()
    for image, why in zip(found[3:], ("no name", "it has '..'", "no such file"), strict=True):
        with pytest.raises(UserError, match=why):
            content(image)


def test_images_in_parquet_files_by_row_groups(photos, tmp_path):
    contents = [(photos / name).read_bytes() for name in names(photos)]
    table = pa.table({"bytes": contents, "path": names(photos), "label": [1] * 9})
    (tmp_path / "set").mkdir()
    pq.write_table(table.slice(0, 5), tmp_path / "set" / "0.parquet", row_group_size=4)
    pq.write_table(table.slice(5), tmp_path / "set" / "1.parquet")
    for source in (tmp_path / "set", tmp_path / "set" / "*.parquet"):
        inputs = read(source, shard_images=3)
        found = images(inputs)
        assert inputs.counts == [3, 1, 1, 3, 1]
        assert [content(image) for image in found] == contents
        assert [(image.id, image.name) for image in found] == list(enumerate(names(photos), 1))
    with pytest.raises(UserError, match="more than max_bytes"):
        content(found[0], 10)


def test_images_in_structs_as_hugging_face_has_them(tmp_path):
    rows = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}, None]
    pq.write_table(pa.table({"image": rows, "image_id": [7, 8, 9]}), tmp_path / "set.parquet")
    found = images(read(tmp_path / "set.parquet"))
    assert [image[:2] for image in found] == [(7, "1.jpg"), (8, "2.jpg"), (9, "")]
    assert content(found[0]) == b"one"
    with pytest.raises(UserError, match="no bytes"):
        content(found[1])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1]}, "neither a column of paths .* it has label"),
        ({"uri": ["a", "b"], "image_id": [1, 1]}, r"has \[1\] more than once"),
        ({"bytes": [b"a", b"b"], "image_id": [2, 2]}, r"has \[2\] more than once"),
        ({"bytes": pa.array([], pa.binary())}, "it has no rows"),
    ],
)
def test_parquet_that_is_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "list.parquet")


def test_what_is_not_there(tmp_path):
    for name in ("none", "none*.jpg", "none.jpg"):
        with pytest.raises(UserError, match="no images at"):
            read(tmp_path / name)
    with pytest.raises(UserError, match="no such file: .*none.parquet"):
        read(tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_text("no Parquet")
    with pytest.raises(UserError, match="cannot read .*broken.parquet"):
        read(tmp_path / "broken.parquet")


def test_a_link_out_of_the_folder_is_not_followed(photos, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"outside")
    (photos / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (image,) = (image for image in images(read(photos)) if image.name == "link.jpg")
    with pytest.raises(UserError, match="symbolic link that leaves"):
        content(image)
