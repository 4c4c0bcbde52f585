"""A document read in pieces is what the standard library reads whole, down to the messages, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_det.data import json_stream
from ray_det.data.json_stream import JsonStream

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=3), children, max_size=4),
    max_leaves=8,
)


def read(content: bytes) -> Any:
    """The document, its top level and the lists there in pieces."""
    stream = JsonStream(content)
    if stream.peek() != "{":
        document = stream.value()
    else:
        document = {
            key: list(stream.elements()) if stream.peek() == "[" else stream.value() for key in stream.members()
        }
    stream.end()
    return document


def outcome(read: Any, content: bytes) -> Any:
    try:
        return read(content)
    except ValueError as error:
        return str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    document=st.dictionaries(st.text(max_size=3), VALUES, max_size=4) | VALUES,
    indent=st.sampled_from([None, 1]),
    escaped=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-le"]),
    chunk=st.integers(1, 9),
)
def test_same_values_as_json(
    document: Any, indent: int | None, escaped: bool, encoding: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    content = json.dumps(document, indent=indent, ensure_ascii=escaped).encode(encoding)
    assert read(content) == json.loads(content) == document


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), chunk=st.integers(1, 9))
def test_same_messages_as_json(data: st.DataObject, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    document = data.draw(st.dictionaries(st.text(max_size=3), VALUES, min_size=1, max_size=4))
    text = json.dumps(document, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=False)
    at = data.draw(st.integers(0, len(text) - 1))
    text = text[:at] + data.draw(st.sampled_from(["", "{", "]", ",", '"', "x", "1e+", "\n"])) + text[at + 1 :]
    assert outcome(read, text.encode()) == outcome(json.loads, text.encode())


@pytest.mark.parametrize(
    "content",
    [b"", b" ", b"{", b'{"a', b'{"a"', b'{"a":', b'{"a":[', b'{"a":[1,]}', b'{"a":[1 2]}', b'{"a":1,}', b"{1:2}",
     b'{"a":1}x', b'{"a":"\xff"}', b'{\n"a": [1,\n2\n3]}', b"[" * 5 + b"1", b"-Infinit", b"12.", b"1e", b"1e+5 "],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_what_is_no_json_is_said_as_json_says_it(content: bytes, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    assert outcome(read, content) == outcome(json.loads, content)


def test_the_last_of_equal_keys_counts() -> None:
    assert read(b'{"a": [1, 2], "b": 3, "a": [4]}') == {"a": [4], "b": 3}


def write_polygons(folder: Path, size: int) -> Path:
    """A COCO JSON of about `size` bytes, nearly all of it polygons; one of its images is there."""
    polygon = ", ".join(f"{(i * 37) % 640 + 0.25:.2f}" for i in range(120))
    record = (
        '{{"id": {0}, "image_id": {1}, "category_id": 1, "bbox": [1.5, 2.5, 30.25, 40], "area": 800.5, '
        f'"iscrowd": 0, "segmentation": [[{polygon}]]}}}}'
    )
    count = size // len(record)
    path = folder / "polygons.json"
    with path.open("w") as file:
        file.write('{"info": {"description": "made up"}, "annotations": [')
        for i in range(1, count + 1):
            file.write(record.format(i, i // 8 + 1) + (", " if i < count else "], "))
        images = [
            {"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(1, count // 8 + 2)
        ]
        file.write(f'"images": {json.dumps(images)}, "categories": [{{"id": 1, "name": "thing"}}]}}')
    Image.new("RGB", (640, 480)).save(folder / images[0]["file_name"])
    return path


PREPARE = """
import resource, sys
from pathlib import Path
from ray_det.data.prepare import prepare
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
manifest, report = prepare(sys.argv[1], None, Path(sys.argv[2]))
print(peak() - before, manifest.counts["boxes"], report.counts["missing_file"])
"""


def growth(source: Path, cache: Path) -> float:
    """Bytes that the peak memory of a process grows by while it prepares the file, per byte of it."""
    command = [sys.executable, "-c", PREPARE, str(source), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, boxes, missing = map(int, done.stdout.split())
    assert boxes > source.stat().st_size / 2000 and missing >= boxes // 8 - 1
    return grown / source.stat().st_size


def test_memory_is_the_files_own_and_little_more(tmp_path: Path) -> None:
    """The whole tree would take 7 times the file."""
    assert growth(write_polygons(tmp_path, 40 << 20), tmp_path / "cache") < 2.5


@pytest.mark.slow
def test_memory_at_a_gigabyte(tmp_path: Path) -> None:
    assert growth(write_polygons(tmp_path, 1 << 30), tmp_path / "cache") < 2
