"""JSON to manifest: the root is found, the cache follows the content, wrong input is one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_det.data.headers import map_in_threads
from ray_det.data.manifest import write_manifest
from ray_det.data.prepare import make, prepare, same_classes
from ray_det.types import ClassList, ImageLimits, UserError


def write(path: Path, names: list[str], **more: Any) -> str:
    """A COCO file of pictures of 64 x 48 with a box each."""
    document = {
        "images": [{"id": i, "file_name": n, "width": 64, "height": 48} for i, n in enumerate(names, start=1)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 2, "bbox": [4, 4, 9, 9]} for i in range(1, len(names) + 1)
        ],
        "categories": [{"id": 2, "name": "thing"}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document | more))
    return str(path)


def save(path: Path, size: tuple[int, int] = (64, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


class Spy:
    """Counts how often the headers were read."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function: Callable, chunks: list) -> list:
        self.calls += 1
        return map_in_threads(function, chunks)


@pytest.fixture
def source(tmp_path: Path) -> str:
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / "images" / name)
    return write(tmp_path / "train.json", ["a.jpg", "b.jpg"])


@pytest.mark.parametrize("place", ["images", ".", "../val2017", "instances_val2017"])
def test_images_are_found_beside_the_json(tmp_path: Path, place: str) -> None:
    root = (tmp_path / "annotations" / place).resolve()
    save(root / "b.jpg")  # the first one is missing: a finding, not another root
    source = write(tmp_path / "annotations" / "instances_val2017.json", ["a.jpg", "b.jpg"])
    manifest, report = prepare(source, None, tmp_path / "cache")
    assert Path(manifest.root).resolve() == root
    assert report is not None and report.counts["missing_file"] == 1
    assert Path(manifest.uri(1)).is_file()


def test_first_place_wins_and_a_given_root_wins_over_it(tmp_path: Path) -> None:
    for folder in ("images", ".", "given"):
        save(tmp_path / folder / "a.jpg")
    source = write(tmp_path / "x.json", ["a.jpg"])
    assert prepare(source, None, tmp_path / "cache")[0].root == f"{tmp_path}/images"
    assert prepare(source, f"{tmp_path}/given/", tmp_path / "cache")[0].root == f"{tmp_path}/given"
    assert prepare(source, f"file://{tmp_path}/given", tmp_path / "cache")[0].root == f"{tmp_path}/given"


def test_relative_paths_become_absolute(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest, _ = prepare("train.json", "images", Path("cache"))
    assert manifest.root == str(tmp_path / "images") and manifest.source == "train.json"


def test_second_call_reads_the_cache(source: str, tmp_path: Path) -> None:
    spy = Spy()
    first, report = prepare(source, None, tmp_path / "cache", map_chunks=spy)
    again, same_report = prepare(source, None, tmp_path / "cache", map_chunks=spy)
    assert spy.calls == 1
    assert again.table.equals(first.table) and replace(again, table=first.table) == first
    assert same_report == report
    assert sorted(p.suffixes[-1] for p in (tmp_path / "cache").iterdir()) == [".json", ".parquet"]


def _touch_json(tmp_path: Path) -> None:
    text = (tmp_path / "train.json").read_text()
    (tmp_path / "train.json").write_text(text.replace("[4, 4, 9, 9]", "[5, 4, 9, 9]"))


def _remove(tmp_path: Path) -> None:
    (tmp_path / "images" / "b.jpg").unlink()


def _resize(tmp_path: Path) -> None:
    save(tmp_path / "images" / "b.jpg", (32, 32))


def _age(tmp_path: Path) -> None:
    os.utime(tmp_path / "images" / "b.jpg", ns=(1, 1))


def _damage_cache(tmp_path: Path) -> None:
    for path in (tmp_path / "cache").glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-9])


def _lose_report(tmp_path: Path) -> None:
    for path in (tmp_path / "cache").glob("*.json"):
        path.write_text("{")


@pytest.mark.parametrize("change", [_touch_json, _remove, _resize, _age, _damage_cache, _lose_report])
def test_cache_is_made_anew_when_anything_changes(source: str, tmp_path: Path, change: Callable[[Path], None]) -> None:
    spy = Spy()
    prepare(source, None, tmp_path / "cache", map_chunks=spy)
    change(tmp_path)
    prepare(source, None, tmp_path / "cache", map_chunks=spy)
    assert spy.calls == 2


def test_other_limits_are_another_preflight(source: str, tmp_path: Path) -> None:
    assert prepare(source, None, tmp_path / "cache")[0].table["readable"].to_pylist() == [True, True]
    small = prepare(source, None, tmp_path / "cache", limits=ImageLimits(pixels=64 * 48 - 1))[0]
    assert small.table["readable"].to_pylist() == [False, False]


def test_file_that_appears_later_is_seen(source: str, tmp_path: Path) -> None:
    _remove(tmp_path)
    assert prepare(source, None, tmp_path / "cache")[0].table["readable"].to_pylist() == [True, False]
    save(tmp_path / "images" / "b.jpg")
    assert prepare(source, None, tmp_path / "cache")[0].table["readable"].to_pylist() == [True, True]


def test_moved_data_set_keeps_its_hash(source: str, tmp_path: Path) -> None:
    before, _ = prepare(source, None, tmp_path / "cache")
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "images").rename(moved / "images")
    Path(source).rename(moved / "other.json")
    after, _ = prepare(str(moved / "other.json"), None, tmp_path / "cache")
    assert after.hash == before.hash and after.root != before.root


def test_copy_of_the_json_is_served_under_its_own_name(source: str, tmp_path: Path) -> None:
    prepare(source, None, tmp_path / "cache")
    copy = tmp_path / "copy.json"
    copy.write_bytes(Path(source).read_bytes())
    manifest, report = prepare(str(copy), None, tmp_path / "cache")
    assert manifest.source == str(copy) and report is not None and report.source == str(copy)


def test_manifest_is_read_as_it_is(source: str, tmp_path: Path) -> None:
    manifest, _ = make(source, None)
    write_manifest(manifest, tmp_path / "m.parquet")
    again, report = prepare(str(tmp_path / "m.parquet"), None, tmp_path / "cache")
    assert again.hash == manifest.hash and report is None
    assert not (tmp_path / "cache").exists()


def test_images_of_a_manifest_may_have_moved(source: str, tmp_path: Path) -> None:
    manifest, _ = make(source, None)
    write_manifest(manifest, tmp_path / "m.parquet")
    moved, _ = prepare(str(tmp_path / "m.parquet"), str(tmp_path / "moved"), tmp_path / "cache")
    assert moved.root == str(tmp_path / "moved") and moved.hash == manifest.hash
    write_manifest(replace(manifest, shards=str(tmp_path)), tmp_path / "packed.parquet")
    with pytest.raises(UserError, match="packed.parquet is of packed images"):
        prepare(str(tmp_path / "packed.parquet"), str(tmp_path / "moved"), tmp_path / "cache")


def test_strict_refuses_errors_also_from_the_cache(source: str, tmp_path: Path) -> None:
    prepare(source, None, tmp_path / "cache", strict=True)  # nothing to refuse
    _remove(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match=r"train\.json is refused.* 1 errors \(missing_file\).*b\.jpg"):
            prepare(source, None, tmp_path / "cache", strict=True)
    prepare(source, None, tmp_path / "cache")


def test_strict_lets_warnings_pass(source: str, tmp_path: Path) -> None:
    write(Path(source), ["a.jpg", "a.jpg"])
    _, report = prepare(source, None, tmp_path / "cache", strict=True)
    assert report is not None and report.counts["duplicate_file_name"] == 1


def test_missing_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no such file: .*/gone\.json$"):
        prepare(str(tmp_path / "gone.json"), None, tmp_path / "cache")
    with pytest.raises(UserError, match=r"^no such file: .*/gone\.parquet$"):
        prepare(str(tmp_path / "gone.parquet"), None, tmp_path / "cache")
    with pytest.raises(UserError, match=r"^cannot read "):
        prepare(str(tmp_path), None, tmp_path / "cache")
    source = write(tmp_path / "x.json", ["a.jpg"])
    with pytest.raises(UserError, match=r"none of the images of .*x\.json .*a\.jpg.*--data\.images"):
        prepare(source, None, tmp_path / "cache")
    with pytest.raises(UserError, match=r"none of the 1 images of .*x\.json is under /nowhere .*--data\.images"):
        prepare(source, "/nowhere", tmp_path / "cache")
    with pytest.raises(UserError, match="empty dataset"):
        prepare(write(tmp_path / "x.json", []), None, tmp_path / "cache")


@pytest.mark.parametrize("images", [None, "."])
def test_name_out_of_the_root_is_refused_before_anything_is_opened(tmp_path: Path, images: str | None) -> None:
    source = write(tmp_path / "x.json", ["../secret.jpg", "a\0.jpg"])
    with pytest.raises(UserError, match=r"'\.\./secret\.jpg' is refused: it has '\.\.'"):
        prepare(source, images, tmp_path / "cache")


def test_splits_must_agree_on_their_categories(source: str) -> None:
    train, _ = make(source, None)
    same_classes(train, train)
    for names, ids, message in (
        (("thing", "new"), (2, 5), "id 5: none / new"),
        (("other",), (2,), "id 2: thing / other"),
        (("thing",), (3,), "id 2: thing / none, id 3: none / thing"),
    ):
        other = replace(train, classes=ClassList(names, ids), source="val.json")
        with pytest.raises(UserError, match=r"categories differ between .*train\.json and val\.json") as caught:
            same_classes(train, other)
        assert message in str(caught.value)
    many = replace(train, classes=ClassList(tuple("abcdefghi"), tuple(range(10, 19))))
    with pytest.raises(UserError, match=r"and 5 more\)$"):
        same_classes(train, many)


NUMBERS = st.one_of(st.floats(), st.integers(-(2**62), 2**62), st.sampled_from([0, 1, 64, 48, 1e308, -1e308]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    box=st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    size=st.tuples(st.integers(-2, 100), st.integers(-2, 100)),
    ids=st.tuples(*[st.integers(0, 2)] * 3),
    name=st.sampled_from(["a.jpg", "b.jpg", "none.jpg", "x/../a.jpg", "", ".", "a" * 300, "é?.jpg", "//a.jpg"]),
)
def test_any_values_are_prepared_or_refused(source: str, box: tuple, size: tuple, ids: tuple, name: str) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": ids[0], "file_name": name, "width": size[0], "height": size[1]}]
    annotations = [{"id": ids[1], "image_id": ids[0], "category_id": ids[2], "bbox": list(box)}]
    write(Path(source), [], images=images, annotations=annotations)
    try:
        manifest, report = make(source, None)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert manifest.counts["trainable_boxes"] == report.trainable_boxes
    assert len(manifest) == len({1, ids[0]})
    assert json.dumps(report.to_json(), allow_nan=False) and report.table()
