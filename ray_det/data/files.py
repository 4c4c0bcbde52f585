"""Local paths through plain files, everything with a scheme (s3://, gs://, ...) through pyarrow's file systems."""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import fs

from ray_det.types import UserError


class OverLimitError(ValueError):
    """A file is, or claims, more than the limits allow."""


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
    """`name` under `root`, which it must not leave: see `leaves_root`."""
    return f"{root.rstrip('/')}/{name}"


def leaves_root(name: str) -> str | None:
    """Why a name may not be joined to a root, or None. Symbolic links are seen by `is_outside`."""
    if "\0" in name:
        return "it has a NUL character"
    if "\\" in name:
        return "it has a backslash (COCO separates folders by '/')"
    if has_scheme(name) or re.match(r"[A-Za-z]+:/", name):
        return "it is a URL"
    if posixpath.isabs(name):
        return "it is an absolute path"
    if ".." in name.split("/"):
        return "it has '..'"
    return None


def require_inside(root: str, names: Iterable[str]) -> None:
    """Raises:
    UserError: a name leaves the root.
    """
    for name in names:
        if why := leaves_root(name):
            raise UserError(f"file_name {name!r} is refused: {why}; it must name a file under {root}")


def is_outside(path: str, root: str) -> bool:
    """Whether a symbolic link leads from under a root out of it; always False for URIs, which have none."""
    if has_scheme(root):
        return False
    real = os.path.realpath(root)
    return os.path.commonpath([os.path.realpath(path), real]) != real


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


def open_bounded(path: str, max_bytes: int) -> Any:
    """As `open_binary`, for a file from somewhere: a plain one, not a device or a pipe, of at most so many bytes.

    Raises:
        OSError: as above, or it is no plain file.
        OverLimitError: it is larger.
    """
    if not has_scheme(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a plain file")
    file = open_binary(path)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size > max_bytes:
        file.close()
        raise too_large(size, max_bytes)
    return file


def too_large(size: int, max_bytes: int) -> OverLimitError:
    return OverLimitError(f"{size} bytes are more than max_bytes {max_bytes}")


def read_bytes(path: str, max_bytes: int | None = None) -> bytes:
    """Content of a file; with `max_bytes` of a plain one of at most so many bytes.

    Raises:
        UserError: it cannot be read, or is larger.
    """
    try:
        with open_binary(path) if max_bytes is None else open_bounded(path, max_bytes) as file:
            return file.read()
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path too
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
