"""Preflights on a storage or disk that fails: no image is unreadable for it, and nothing is kept."""

from __future__ import annotations

import io
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ray_det.data import files
from ray_det.data.headers import Header, HeaderChunk, MapChunks, scan
from ray_det.data.parts import WHOLE_BYTES
from ray_det.data.prepare import prepare
from ray_det.storage import Folder, StorageError
from ray_det.types import UserError
from tests.data.test_prepare import save, write


def fails_once(source: str, map_chunks: MapChunks, cache: Path, kind: type[Exception], why: str) -> None:
    """A preflight ends with one line that names an image, and the next one finds it."""
    with pytest.raises(kind, match=f"^cannot read {re.escape(source.rpartition('/')[0])}/images/a.jpg: .*{why}"):
        prepare(source, None, cache, map_chunks=map_chunks)
    assert not cache.exists() or not list(cache.iterdir())
    report = prepare(source, None, cache)[1]
    assert report is not None and not report.errors


def test_a_disk_that_fails(tmp_path: Path) -> None:
    def without_files(function: Callable[[HeaderChunk], list[Header]], chunks: list[HeaderChunk]) -> list[list[Header]]:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            return list(map(function, chunks))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    save(tmp_path / "images" / "a.jpg")
    source = write(tmp_path / "train.json", ["a.jpg"])
    fails_once(source, without_files, tmp_path / "cache", UserError, "Too many open files")


@pytest.mark.usefixtures("s3")
def test_a_storage_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(function: Callable[[HeaderChunk], list[Header]], chunks: list[HeaderChunk]) -> list[list[Header]]:
        with monkeypatch.context() as patched:
            patched.setenv("AWS_SECRET_ACCESS_KEY", "another")
            files._filesystem.cache_clear()
            try:
                return list(map(function, chunks))
            finally:
                files._filesystem.cache_clear()

    save(tmp_path / "data" / "images" / "a.jpg")
    write(tmp_path / "data" / "train.json", ["a.jpg"])
    folder = Folder.at(f"s3://bucket/{tmp_path.name}")
    folder.upload(tmp_path / "data")
    fails_once(f"{folder.uri}/train.json", refused, tmp_path / "cache", StorageError, "ACCESS_DENIED")


class Failing(io.BytesIO):
    """Reads of the second half fail, once for each error."""

    def __init__(self, content: bytes, errors: list[OSError]) -> None:
        super().__init__(content)
        self.errors = errors

    def read(self, *size: Any) -> bytes:
        if self.errors and self.tell() > len(self.getbuffer()) // 2:
            raise self.errors.pop()
        return super().read(*size)


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_reads_of_a_large_remote_file_are_tried_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a", kind)
    assert (tmp_path / "a").stat().st_size > WHOLE_BYTES
    errors: list[OSError] = [OSError("slow down")]
    content = (tmp_path / "a").read_bytes()
    monkeypatch.setattr(files, "open_bounded", lambda path, most: pa.PythonFile(Failing(content, errors), "r"))
    assert scan("s3://bucket", ["a"])[0].state == "ok" and not errors
    errors.append(PermissionError("expired"))
    with pytest.raises(StorageError, match="^cannot read s3://bucket/a: expired$"):
        scan("s3://bucket", ["a"])


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("size", [16, 2 * WHOLE_BYTES])
def test_a_header_that_points_nowhere_is_unreadable_wherever_it_lies(size: int, tmp_path: Path) -> None:
    for name, offset in (("behind", 1 << 40), ("far", 1 << 62), ("farther", (1 << 64) - 1)):
        (tmp_path / name).write_bytes((b"II+\0\x08\0\0\0" + offset.to_bytes(8, "little")).ljust(size, b"\0"))
    (tmp_path / "folder").mkdir()
    names = ["behind", "far", "farther", "folder", "n" * 300]
    assert [header.state for header in scan(str(tmp_path), names)] == ["unreadable"] * 5
    remote = Folder.at(f"s3://bucket/{tmp_path.name}")
    remote.upload(tmp_path)
    assert [header.state for header in scan(remote.uri, names[:3])] == ["unreadable"] * 3
