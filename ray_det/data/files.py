"""Local paths through plain files, everything with a scheme (s3://, gs://, ...) through pyarrow's file systems."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import fs

from ray_det.retry import patiently
from ray_det.types import UserError


class Stat(NamedTuple):
    size: int  # bytes
    mtime_ns: int


def has_scheme(path: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def absolute(path: str) -> str:
    """A URI as it is (without a final slash), `file://` and plain paths as an absolute local path."""
    path = path.removeprefix("file://")
    return path.rstrip("/") if has_scheme(path) else os.path.abspath(os.path.expanduser(path))


def join(root: str, name: str) -> str:
    """`name` under `root`, or `name` alone where it is absolute or a URI."""
    return name if name.startswith("/") or has_scheme(name) else f"{root.rstrip('/')}/{name}"


def parent(path: str) -> str:
    return path.rsplit("/", 1)[0]


@lru_cache
def _filesystem(scheme: str, host: str) -> tuple[fs.FileSystem, str]:
    return fs.FileSystem.from_uri(f"{scheme}://{host}/")


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI and the path on it.

    Raises:
        UserError: pyarrow knows no such file system, or cannot reach it.
    """
    scheme, rest = uri.split("://", 1)
    host, _, path = rest.partition("/")
    try:
        filesystem, base = _filesystem(scheme, host)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot open {uri}: {_one_line(error)}") from error
    return filesystem, f"{base.rstrip('/')}/{path}".rstrip("/")


def open_binary(path: str) -> Any:
    """A readable, seekable binary file; a context manager.

    Raises:
        OSError: FileNotFoundError where there is none.
    """
    if not has_scheme(path):
        return open(path, "rb")
    filesystem, inner = resolve(path)
    return filesystem.open_input_file(inner)


def read_bytes(path: str, patience_s: float = 0.0) -> bytes:
    """Content of a file.

    Args:
        patience_s: seconds for which a storage may be out of reach.

    Raises:
        UserError: it cannot be read.
    """

    def read() -> bytes:
        with open_binary(path) as file:
            return file.read()

    try:
        return patiently(read, patience_s=patience_s)
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {_one_line(error)}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place at the end: nobody sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stats(root: str, names: list[str]) -> list[Stat | None]:
    """Size and time of change of every file under `root`, None where there is none. Remote folders are listed once."""
    if not has_scheme(root):
        return [_stat(i) for i in fs.LocalFileSystem().get_file_info([join(root, n) for n in names])]
    filesystem, base = resolve(root)
    paths = [posixpath.normpath(f"{base}/{name}") for name in names]
    found: dict[str, Stat | None] = {}
    try:
        for folder in sorted({parent(path) for path in paths}):
            listing = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
            found |= {info.path: _stat(info) for info in listing}
    except OSError as error:
        raise UserError(f"cannot list {root}: {_one_line(error)}") from error
    return [found.get(path) for path in paths]


def is_file(path: str) -> bool:
    if not has_scheme(path):
        return os.path.isfile(path)
    filesystem, inner = resolve(path)
    try:
        return _stat(filesystem.get_file_info([inner])[0]) is not None
    except OSError as error:
        raise UserError(f"cannot reach {path}: {_one_line(error)}") from error


def _stat(info: fs.FileInfo) -> Stat | None:
    return Stat(info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
