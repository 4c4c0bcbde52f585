"""What `--input` may be, as lists of images in shards."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_det.data import files, paths
from ray_det.data.decode import decode
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


@pytest.mark.parametrize("suffix", paths.IMAGE_SUFFIXES)
def test_every_kind_that_is_looked_for_is_decoded(tmp_path, suffix):
    Image.new("1" if suffix == ".pbm" else "RGB", (30, 20)).save(tmp_path / f"a{suffix}")
    (image,) = images(read(tmp_path))
    assert decode(content(image), image.name).shape == (20, 30, 3)


def test_other_endings_of_these_kinds_are_looked_for(tmp_path):
    for suffix in ("pnm", "pbm", "jfif", "J2K"):
        Image.new("1" if suffix == "pbm" else "RGB", (30, 20)).save(tmp_path / f"a.{suffix}")
    assert len(images(read(tmp_path))) == 4


@pytest.mark.parametrize("source", ["photos", "link", "photos/**/*.jpg", "link/**/*.jpg"])
@pytest.mark.parametrize("output", ["{}/photos/out", "{}/link/out", "file://{}/photos/out", "file://{}/link/out/"])
def test_the_output_is_none_of_the_input_by_whatever_way_it_is_named(photos, tmp_path, source, output):
    (tmp_path / "link").symlink_to(photos)
    before = images(read(tmp_path / source))
    (photos / "out" / "pictures").mkdir(parents=True)
    (photos / "out" / "pictures" / "1.jpg").write_bytes(b"drawn")
    (photos / "outer.jpg").write_bytes(b"another")
    found = images(read(tmp_path / source, output=output.format(tmp_path)))
    assert {image.name for image in found} == {image.name for image in before} | {"outer.jpg"}


def test_what_is_drawn_beside_a_parquet_is_no_input(tmp_path):
    pq.write_table(pa.table({"bytes": [b"a", b"b"]}), tmp_path / "set.parquet")
    first = read(tmp_path, output=tmp_path / "out")
    for name in ("pictures/1.jpg", "images.parquet/part-000000.parquet"):
        (tmp_path / "out" / name).parent.mkdir(parents=True)
        (tmp_path / "out" / name).write_bytes(b"written")
    again = read(tmp_path, output=tmp_path / "out")
    assert again.digest == first.digest and [content(image) for image in images(again)] == [b"a", b"b"]


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


def test_paths_are_beside_their_own_file(photos, tmp_path):
    for i, folder in enumerate("abc"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        (tmp_path / "set" / folder / "0.jpg").write_bytes(folder.encode())
        listed = ["0.jpg", str(photos / "cut.jpg"), None, "../a/0.jpg"]
        ids = pa.array(range(4 * i, 4 * i + 4), pa.int64() if i else pa.int32())
        pq.write_table(pa.table({"uri": listed, "image_id": ids}), tmp_path / "set" / folder / "index.parquet")
    found = images(read(tmp_path / "set" / "*" / "index.parquet"))
    assert [image.id for image in found] == list(range(12))
    assert [image.name for image in found[::4]] == ["a/0.jpg", "b/0.jpg", "c/0.jpg"]
    assert [content(image) for image in found[::4]] == [b"a", b"b", b"c"]
    assert {content(image) for image in found[1::4]} == {(photos / "cut.jpg").read_bytes()}
    for why, several in (("no name", found[2::4]), ("it has '..'", found[3::4])):
        for image in several:
            with pytest.raises(UserError, match=why):
                content(image)


def test_a_file_alone_or_beside_others_has_its_names_as_they_are(tmp_path):
    folder = tmp_path / "set" / "deep"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(b"one")
    pq.write_table(pa.table({"path": ["1.jpg"]}), folder / "0.parquet")
    alone = read(folder / "0.parquet")
    assert read(tmp_path / "**" / "*.parquet").digest == alone.digest
    pq.write_table(pa.table({"path": ["2.jpg"]}), folder / "1.parquet")
    found = images(read(tmp_path / "**" / "*.parquet"))
    assert [image[:2] for image in found] == [(1, "1.jpg"), (2, "2.jpg")]
    assert content(found[0]) == content(images(alone)[0]) == b"one"


def test_a_shard_reads_little_more_than_its_own_images(tmp_path, monkeypatch):
    given = np.random.default_rng(0).integers(0, 256, (512, 1 << 14), np.uint8)
    table = pa.table({"bytes": [image.tobytes() for image in given]})
    pq.write_table(table, tmp_path / "set.parquet", write_batch_size=16)  # a page is never larger than that
    inputs, taken = read(tmp_path / "set.parquet", shard_images=16), 0

    class Counted(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal taken
            content = super().read(size) or b""
            taken += len(content)
            return content

    monkeypatch.setattr(files, "open_binary", Counted)
    assert len(list(inputs.read(inputs.shards[0]))) == 16
    assert 16 * given[0].nbytes <= taken < given.nbytes / 2


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
        ({"uri": ["a"], "image_id": ["x"]}, r"list.parquet: image_id must be numbers, and is string"),
        ({"bytes": [b"a"], "image_id": ["x"]}, r"list.parquet: image_id must be numbers, and is string"),
        ({"uri": ["a"], "image_id": [1.5]}, r"list.parquet: image_id must be whole numbers: .*1.5"),
        ({"bytes": [b"a"], "image_id": pa.array([1 << 63], pa.uint64())}, r"image_id must be whole numbers: .*9223372"),
    ],
)
def test_parquet_that_is_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "list.parquet")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"uri": ["a"]}, {"path": ["b"]}, r"b.parquet has no column uri, as .*a.parquet has; it has path"),
        ({"bytes": [b"a"]}, {"image": [b"b"]}, r"b.parquet has no column bytes, as .* it has image"),
        ({"bytes": [b"a"], "path": ["a"]}, {"bytes": [b"b"]}, r"b.parquet has no column path, as .* it has bytes"),
        ({"uri": ["a"], "image_id": [1]}, {"uri": ["b"]}, r"b.parquet has no column image_id, as .* it has uri"),
        ({"uri": ["a"]}, {"uri": [1]}, r"b.parquet: uri must be text, and is int64"),
        ({"bytes": [b"a"]}, {"bytes": ["b"]}, r"b.parquet: bytes must be images, and is string"),
        ({"uri": ["a"], "image_id": [1]}, {"uri": ["b"], "image_id": ["2"]}, r"b.parquet: image_id must be numbers"),
    ],
)
def test_files_that_do_not_go_together(tmp_path, first, second, message):
    for name, columns in (("a", first), ("b", second)):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("column", [{"bytes": [b"a"]}, {"uri": ["a"]}])
def test_ids_of_several_widths_go_together(tmp_path, column):
    for i, kind in enumerate((pa.int32(), pa.int64(), pa.uint8(), pa.float64())):
        pq.write_table(pa.table({**column, "image_id": pa.array([9 - i], kind)}), tmp_path / f"{i}.parquet")
    ids = [image.id for image in images(read(tmp_path))]
    assert ids == [9, 8, 7, 6] and all(isinstance(i, int) for i in ids)


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
