"""Every kind of finding planted once: exact counts, file, annotation id and value."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import fs

from ray_det.data import coco, files
from ray_det.data.headers import CHUNK_FILES, Header, read_headers, scan
from ray_det.data.manifest import build
from ray_det.data.preflight import KINDS, PreflightReport, inspect, require_trainable
from ray_det.types import ImageLimits, UserError

REAL = os.environ.get("RAY_DET_REAL_DATA")
NAN, INF = float("nan"), float("inf")


def save(path: Path, *, orientation: int | None = None, mode: str = "RGB") -> None:
    """A picture of 64 x 48 stored pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)


def save_two(path: Path) -> None:
    """Two pictures of that size in one file."""
    first, second = (Image.new("RGB", (64, 48), colour) for colour in ("red", "blue"))
    first.save(path, save_all=True, append_images=[second])


def read(document: dict[str, Any]) -> coco.CocoData:
    return coco.parse(json.dumps(document).encode(), "x.json")


def image(image_id: int, name: str, width: int = 64, height: int = 48) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "width": width, "height": height}


def box(annotation_id: int, image_id: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"id": annotation_id, "image_id": image_id, "category_id": 2, "bbox": bbox, "iscrowd": 0, **more}


def document(images: list[dict], annotations: list[dict]) -> dict[str, Any]:
    return {"images": images, "annotations": annotations, "categories": [{"id": 2, "name": "thing"}]}


GOOD: list[float] = [4, 4, 20, 10]


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, Any]:
    """A data set under tmp_path in which every kind of finding is found once (EXIF orientation twice)."""
    for name in ("good.jpg", "size.jpg", "twice.jpg", "other.jpg", "cut.png"):
        save(tmp_path / name)
    save_two(tmp_path / "empty.webp")
    save(tmp_path / "turned.jpg", orientation=6)
    save(tmp_path / "half.jpg", orientation=3)
    save(tmp_path / "sub" / "gray.png", mode="L")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    images = [
        image(1, "good.jpg"),
        image(2, "gone.jpg"),
        image(3, "cut.png"),
        image(4, "size.jpg", 100, 100),
        image(5, "turned.jpg", 48, 64),
        image(6, "half.jpg"),
        image(7, "sub/gray.png"),
        image(8, "empty.webp"),
        image(9, "twice.jpg"),
        image(10, "./twice.jpg"),
        image(11, "other.jpg"),
        image(11, "other.jpg"),
    ]
    fine = [box(100 + i["id"], i["id"], GOOD) for i in images[:-1] if i["id"] != 8]
    wrong = [
        box(1, 1, [NAN, 1, 2, 3]),
        box(2, 1, [10, 10, 0, 5]),
        box(3, 1, [70, 10, 5, 5]),
        box(4, 1, [60, 10, 10, 10]),
        box(5, 1, GOOD, area=INF),
        box(6, 77, GOOD),
        box(7, 1, GOOD, category_id=3),
        box(8, 1, [0, 0, 64, 48], iscrowd=1),
        box(0, 1, GOOD),
        box(101, 1, [1, 1, 5, 5]),
    ]
    return document(images, fine + wrong) | {"categories": [{"id": i, "name": "thing"} for i in (5, 2)]}


def test_finds_each_kind_with_file_annotation_and_value(planted: dict, tmp_path: Path) -> None:
    _, report = inspect(read(planted), str(tmp_path))
    assert report.counts == {kind: 1 for kind in KINDS} | {"exif_orientation": 2}
    first = {kind: (f[0].file, f[0].annotation_id, f[0].value) for kind, f in report.findings.items()}
    assert first == {
        "missing_file": ("gone.jpg", None, "no such file"),
        "unreadable_file": ("cut.png", None, first["unreadable_file"][2]),
        "size_mismatch": ("size.jpg", None, "declared 100 x 100, stored 64 x 48"),
        "size_turned": ("turned.jpg", None, "declared 48 x 64, stored 64 x 48, EXIF orientation 6"),
        "exif_orientation": ("turned.jpg", None, "6"),
        "mode_not_rgb": ("sub/gray.png", None, "L"),
        "several_frames": ("empty.webp", None, "first frame"),
        "image_without_boxes": ("empty.webp", None, "no boxes"),
        "duplicate_file_name": ("./twice.jpg", None, "image id 10"),
        "duplicate_image_id": ("other.jpg", None, "image id 11"),
        "non_finite_box": ("good.jpg", 1, "[nan, 1, 2, 3]"),
        "degenerate_box": ("good.jpg", 2, "[10, 10, 0, 5]"),
        "box_outside_image": ("good.jpg", 3, "[70, 10, 5, 5] in 64 x 48"),
        "box_partly_outside": ("good.jpg", 4, "[60, 10, 10, 10] in 64 x 48"),
        "non_finite_area": ("good.jpg", 5, "area inf"),
        "unknown_image_id": ("(no image)", 6, "image id 77"),
        "unknown_category_id": ("good.jpg", 7, "category id 3"),
        "crowd": ("good.jpg", 8, "[0, 0, 64, 48]"),
        "annotation_id_zero": ("good.jpg", 0, "[4, 4, 20, 10]"),
        "duplicate_annotation_id": ("good.jpg", 101, "[1, 1, 5, 5]"),
        "duplicate_category_name": ("category 5", None, "thing, as category 2"),
    }
    assert report.errors == 11
    assert (report.images, report.annotations, report.classes) == (12, 20, 2)


def test_what_cannot_be_trained_on_leaves_the_targets_only(planted: dict, tmp_path: Path) -> None:
    checked, report = inspect(read(planted), str(tmp_path))
    manifest = build(checked, str(tmp_path))
    rows = {row["image_id"]: row for row in manifest.table.to_pylist()}
    assert list(rows) == list(range(1, 12))
    assert [i for i, row in rows.items() if not row["trainable"]] == [2, 3, 4, 5]
    assert [i for i, row in rows.items() if not row["readable"]] == [2, 3]
    assert [i for i, row in rows.items() if row["problem"]] == [2, 3, 4, 5]
    assert (rows[4]["height"], rows[4]["width"]) == (48, 64)  # as stored, not as declared
    assert (rows[2]["height"], rows[2]["width"]) == (48, 64)  # nothing else is known
    assert [rows[i]["orientation"] for i in (1, 5, 6)] == [1, 6, 3]
    assert dict(zip(rows[1]["annotation_ids"], rows[1]["box_ok"], strict=True)) == {
        101: True, 1: False, 2: False, 3: False, 4: True, 5: True, 8: False, 0: True,
    }  # fmt: skip
    assert len(rows[1]["annotation_ids"]) == 9  # 101 stands twice; 7 is of no category
    assert rows[2]["annotation_ids"] == [102]  # kept for evaluation
    assert manifest.counts["trainable_boxes"] == report.trainable_boxes == 10
    assert manifest.counts["trainable_images"] == report.trainable_images == 7


def test_different_files_of_one_image_id_are_not_trained_on(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "b.jpg")
    images = [image(1, "a.jpg"), image(2, "b.jpg"), image(1, "b.jpg")]
    checked, _ = inspect(read(document(images, [box(1, 1, GOOD), box(2, 2, GOOD)])), str(tmp_path))
    table = build(checked, str(tmp_path)).table
    assert table["image_id"].to_pylist() == [1, 2]
    assert table["uri"].to_pylist() == ["b.jpg", "b.jpg"]  # the last entry, as pycocotools takes it
    assert table["trainable"].to_pylist() == [False, True]
    assert table["problem"][0].as_py() == "several files share this image id"


def test_turned_size_needs_a_turning_orientation(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        save(tmp_path / f"{orientation}.jpg", orientation=orientation)
    images = [image(i, f"{i}.jpg", 48, 64) for i in range(1, 9)]
    _, report = inspect(read(document(images, [])), str(tmp_path))
    assert [f.image_id for f in report.findings["size_mismatch"]] == [1, 2, 3, 4]
    assert [f.image_id for f in report.findings["size_turned"]] == [5, 6, 7, 8]
    assert report.counts["exif_orientation"] == 7


def test_boxes_that_vanish_in_float32_are_degenerate(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    data = read(document([image(1, "a.jpg")], [box(1, 1, [40, 4, 1e-9, 4]), box(2, 1, [1e308, 0, 1e308, 1])]))
    _, report = inspect(data, str(tmp_path))
    assert report.counts["degenerate_box"] == 1 and report.counts["box_outside_image"] == 1


def test_rounding_is_no_box_out_of_the_image(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    data = read(document([image(1, "a.jpg")], [box(1, 1, [0.1, 0.2, 63.9 + 1e-12, 47.8])]))
    _, report = inspect(data, str(tmp_path))
    assert not any(report.counts.values())
    assert "nothing to report" in report.table()


def test_report_survives_json_and_reads_as_a_table(planted: dict, tmp_path: Path) -> None:
    _, report = inspect(read(planted), str(tmp_path))
    text = json.dumps(report.to_json(), allow_nan=False)
    assert PreflightReport.from_json(json.loads(text)) == report
    table = report.table()
    assert all(kind in table for kind in KINDS)
    assert "good.jpg annotation 2: [10, 10, 0, 5]" in table
    entry = json.loads(text)["findings"]["degenerate_box"]
    assert entry["count"] == 1 and entry["severity"] == "error"
    assert entry["examples"] == [
        {"file": "good.jpg", "image_id": 1, "annotation_id": 2, "value": "[10, 10, 0, 5]"},
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/hosts", "absolute path"),
        ("../a.jpg", "'..'"),
        ("sub/../../a.jpg", "'..'"),
        ("a\0.jpg", "NUL"),
        ("sub\\a.jpg", "backslash"),
        ("http://example.com/a.jpg", "URL"),
        ("file:///a.jpg", "URL"),
        ("C:/a.jpg", "URL"),
    ],
)
def test_name_that_leaves_the_root_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    save(tmp_path / "a.jpg")
    data = read(document([image(1, "a.jpg"), image(2, name)], []))
    with pytest.raises(UserError, match=r"is refused: .*") as caught:
        inspect(data, str(tmp_path))
    assert repr(name) in str(caught.value) and reason in str(caught.value) and "\0" not in str(caught.value)


def test_link_out_of_the_root_is_refused_and_one_inside_is_not(tmp_path: Path) -> None:
    save(tmp_path / "secret.jpg")
    save(tmp_path / "root" / "a.jpg")
    (tmp_path / "root" / "inside.jpg").symlink_to("a.jpg")
    (tmp_path / "alias").symlink_to("root")  # a root that is a link itself is fine
    inspect(read(document([image(1, "inside.jpg")], [])), str(tmp_path / "alias"))
    (tmp_path / "root" / "out.jpg").symlink_to("../secret.jpg")
    with pytest.raises(UserError, match=r"'out\.jpg' is refused: it is a symbolic link"):
        inspect(read(document([image(1, "a.jpg"), image(2, "out.jpg")], [])), str(tmp_path / "root"))


def test_no_image_at_all_names_root_example_and_option(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        inspect(read(document([image(1, "a.jpg")], [])), str(tmp_path))
    assert all(part in str(caught.value) for part in (str(tmp_path), "a.jpg", "--data.images"))


def test_nothing_to_train_on_is_an_error_when_asked(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "b.jpg")
    images = [image(1, "a.jpg"), image(2, "b.jpg", 9, 9)]
    crowd, wrong_picture, fine = box(1, 1, GOOD, iscrowd=1), box(2, 2, GOOD), box(3, 1, GOOD)
    for chosen, good in (([crowd, wrong_picture], False), ([], False), ([crowd, fine], True)):
        manifest = build(inspect(read(document(images, chosen)), str(tmp_path))[0], str(tmp_path))
        if good:
            require_trainable(manifest)
        else:
            with pytest.raises(UserError, match=r"x\.json has no box to train on"):
                require_trainable(manifest)


def test_headers_of_odd_files(tmp_path: Path) -> None:
    save(tmp_path / "cmyk.jpg", mode="CMYK")
    save(tmp_path / "palette.png", mode="P")
    save(tmp_path / "rgba.png", mode="RGBA")
    save(tmp_path / "turned.png", orientation=8)
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(tmp_path / "deep.png")
    save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[:-200])
    (tmp_path / "tail.jpg").write_bytes(content + b"maker's notes" * 20)  # whole, with something after it
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "nothing.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    names = ["cmyk.jpg", "palette.png", "rgba.png", "turned.png", "deep.png", "tail.jpg"]
    headers = read_headers((str(tmp_path), names))
    assert [h.mode for h in headers] == ["CMYK", "P", "RGBA", "RGB", "I;16", "RGB"]
    assert [h.orientation for h in headers] == [1, 1, 1, 8, 1, 1]
    assert all((h.state, h.height, h.width, h.problem) == ("ok", 48, 64, "") for h in headers)
    broken = read_headers((str(tmp_path), ["cut.jpg", "text.jpg", "nothing.jpg", "folder.jpg", "cmyk.jpg/x.jpg"]))
    assert [h.state for h in broken] == ["unreadable"] * 4 + ["missing"]
    assert all(h.problem and str(tmp_path) not in h.problem and "\n" not in h.problem for h in broken)


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (ImageLimits(pixels=64 * 48 - 1), "64 x 48 are more pixels than max_pixels 3071"),
        (ImageLimits(bytes=1000), "bytes are more than max_bytes 1000"),
    ],
)
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_file_over_a_limit_is_unreadable(tmp_path: Path, name: str, limits: ImageLimits, problem: str) -> None:
    save(tmp_path / name)
    header = read_headers((str(tmp_path), [name]), limits)[0]
    assert header.state == "unreadable" and header.problem.endswith(problem)
    assert read_headers((str(tmp_path), [name]), ImageLimits(64 * 48, 10**5))[0].state == "ok"


def test_a_pipe_is_unreadable_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    header = read_headers((str(tmp_path), ["a.jpg"]))[0]
    assert (header.state, header.problem) == ("unreadable", "OSError: not a plain file")


def test_several_frames_are_told_once_per_file(tmp_path: Path) -> None:
    names = [f"a.{kind}" for kind in ("gif", "webp", "png", "mpo", "tif", "avif")]
    for name in names:
        save_two(tmp_path / name)
    save(tmp_path / "still.gif")
    images = [image(i, name) for i, name in enumerate([*names, "still.gif"], start=1)]
    _, report = inspect(read(document(images, [])), str(tmp_path))
    assert [f.file for f in report.findings["several_frames"]] == names
    assert report.errors == 0


def test_chunks_are_mapped_by_the_given_function_in_order(tmp_path: Path) -> None:
    calls: list[int] = []

    def map_chunks(function: Any, chunks: list) -> list[list[Header]]:
        calls.extend(len(names) for _, names in chunks)
        return [[Header("ok", 1, int(name), 1) for name in names] for _, names in chunks]

    count = 2 * CHUNK_FILES + 3
    headers = scan(str(tmp_path), [str(i) for i in range(count)], map_chunks)
    assert calls == [CHUNK_FILES, CHUNK_FILES, 3]
    assert [h.width for h in headers] == list(range(count))


def test_uri_goes_through_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "bucket" / "sub" / "a.jpg", orientation=6)
    local = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(files, "_filesystem", lambda scheme, host: (local, host))
    names = ["./sub/a.jpg", "sub/gone.jpg"]
    headers = scan("fake://bucket", names)
    assert headers[0] == Header("ok", 48, 64, 6, "RGB") and headers[1].state == "missing"
    stats = files.stats("fake://bucket", names)
    assert stats[0] is not None and stats[0].size == (tmp_path / "bucket/sub/a.jpg").stat().st_size
    assert stats[1] is None
    assert files.is_file("fake://bucket/sub/a.jpg") and not files.is_file("fake://bucket/sub/gone.jpg")


def test_unknown_scheme_is_named() -> None:
    with pytest.raises(UserError, match="cannot open nosuch://a/b"):
        files.read_bytes("nosuch://a/b")


@pytest.mark.skipif(not REAL, reason="RAY_DET_REAL_DATA names no folder")
@pytest.mark.parametrize(
    ("split", "images", "boxes", "expected"),
    [
        ("bccd/train", 205, 2805, {"degenerate_box": 1}),
        ("bccd/val", 87, 1138, {"degenerate_box": 1}),
        ("bccd/test", 72, 945, {}),
        ("coco_cc/train", 57, 557, {"crowd": 6}),
        ("coco_cc/val", 33, 278, {"crowd": 3}),
        ("coco_cc/test", 33, 282, {"crowd": 5, "image_without_boxes": 2}),
    ],
)
def test_real_photographs(split: str, images: int, boxes: int, expected: dict[str, int]) -> None:
    source = Path(str(REAL)) / f"{split}.json"
    _, report = inspect(coco.parse(source.read_bytes(), str(source)), str(source.parent / "images"))
    assert (report.images, report.annotations) == (images, boxes)
    assert {kind: n for kind, n in report.counts.items() if n} == expected
    found = [(f.file, f.annotation_id, f.value) for f in report.findings.get("degenerate_box", ())]
    known = {
        "bccd/train": [("BloodImage_00343.jpg", 2288, "[181, 329, 0, 0]")],
        "bccd/val": [("BloodImage_00338.jpg", 3692, "[504, 337, 0, 0]")],
    }
    assert found == known.get(split, [])
