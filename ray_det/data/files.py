"""Local paths through plain files, everything with a scheme (s3://, gs://, ...) through pyarrow's file systems."""

from __future__ import annotations

import os
import posixpath
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from ray_det import uris
from ray_det.data.paths import has_scheme, join, parent
from ray_det.retry import PATIENCE_S, patiently
from ray_det.storage import Folder, StorageError
from ray_det.types import UserError

T = TypeVar("T")

READS_AT_ONCE = 16
"""Files that a process reads at once: an object store answers after tens of milliseconds, whatever is asked."""


class OverLimitError(ValueError):
    """A file is, or claims, more than the limits allow."""


class Stat(NamedTuple):
    size: int  # bytes
    mtime_ns: int


_filesystem = lru_cache(uris.open_root)


def resolve(uri: str) -> uris.Opened:
    """As `uris.resolve`; a file system stays open in this process."""
    return uris.resolve(uri, _filesystem)


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


def read_bytes(path: str, max_bytes: int | None = None, patience_s: float = PATIENCE_S) -> bytes:
    """Content of a file; with `max_bytes` of a plain one of at most so many bytes.

    Args:
        patience_s: seconds for which a remote storage may be out of reach.

    Raises:
        UserError: it cannot be read, or is larger.
        StorageError: a remote storage stayed out of reach.
    """

    def read() -> bytes:
        with open_binary(path) if max_bytes is None else open_bounded(path, max_bytes) as file:
            return file.read()

    try:
        return _patiently(path, read, patience_s)
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path too
        raise unreadable(path, error) from error


def _patiently(path: str, call: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """A local disk is not waited for."""
    return patiently(call, patience_s=patience_s) if has_scheme(path) else call()


def unreadable(path: str, error: Exception) -> UserError | StorageError:
    """A file that is bad, or a storage that is: what is read from it may be fine."""
    kind = StorageError if has_scheme(path) and isinstance(error, OSError) else UserError
    return kind(f"cannot read {path}: {_one_line(error)}")


def read_text(path: str) -> str:
    """Content of a text file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def read_all(paths: list[str]) -> list[bytes | None]:
    """Contents of many small files, None where there is none."""

    def read(path: str) -> bytes | None:
        def content() -> bytes:
            with open_binary(path) as file:
                return file.read()

        try:
            return _patiently(path, content)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"cannot read {path}: {_one_line(error)}") from error

    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        return list(pool.map(read, paths))


def listing(folder: str) -> list[str]:
    """Paths of all files in a folder, at any depth, relative to it and sorted; none where there is no folder.

    On a local disk symbolic links to folders are not followed: they may go in circles.
    """
    if not has_scheme(folder):
        found = [os.path.join(base, name) for base, _, names in os.walk(folder) for name in names]
        return sorted(os.path.relpath(path, folder) for path in found if os.path.isfile(path))
    filesystem, path = resolve(folder)
    try:
        selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
        infos = _patiently(folder, lambda: filesystem.get_file_info(selector))
    except OSError as error:
        raise UserError(f"cannot list {folder}: {_one_line(error)}") from error
    return sorted(posixpath.relpath(info.path, path) for info in infos if info.type == fs.FileType.File)


@lru_cache(maxsize=64)
def _opened(path: str) -> pa.NativeFile:
    filesystem, inner = resolve(path) if has_scheme(path) else (fs.LocalFileSystem(), path)
    return filesystem.open_input_file(inner)


def read_range(path: str, offset: int, length: int, patience_s: float = PATIENCE_S) -> bytes:
    """Exactly `length` bytes of a file, by one request; the file stays open in this process. Threads may share it.

    Args:
        patience_s: seconds for which a remote storage may be out of reach.

    Raises:
        UserError: it cannot be read, or ends before.
        StorageError: a remote storage stayed out of reach.
    """
    try:
        content = _patiently(path, lambda: _opened(path).read_at(length, offset), patience_s)
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if len(content) != length:
        raise UserError(f"{path} is damaged: it ends before byte {offset + length}")
    return content


@contextmanager
def writing(path: str, patience_s: float = PATIENCE_S) -> Iterator[Path]:
    """A temporary local file that becomes `path`, local or a URI, when the block ends well: nobody sees half a file.

    Args:
        patience_s: seconds for which a remote storage may be out of reach.
    """
    path = uris.plain(path)
    if not has_scheme(path):
        with replacing(Path(path)) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="ray_det_") as scratch:
        temporary = Path(scratch) / path.rsplit("/", 1)[1]
        yield temporary
        Folder(parent(path), patience_s).upload(temporary, temporary.name)


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
        return [_local_stat(join(root, name)) for name in names]
    filesystem, base = resolve(root)
    paths = [posixpath.normpath(f"{base}/{name}") for name in names]
    found: dict[str, Stat | None] = {}
    try:
        for folder in sorted({parent(path) for path in paths}):
            selector = fs.FileSelector(folder, allow_not_found=True)
            listing = _patiently(root, partial(filesystem.get_file_info, selector))
            found |= {info.path: _stat(info) for info in listing}
    except OSError as error:
        raise UserError(f"cannot list {root}: {_one_line(error)}") from error
    return [found.get(path) for path in paths]


def _local_stat(path: str) -> Stat | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # of all kinds: a name may be too long, or go through a file
        return None
    return Stat(found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def is_file(path: str) -> bool:
    return _kind(path) == fs.FileType.File if has_scheme(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    return _kind(path) == fs.FileType.Directory if has_scheme(path) else os.path.isdir(path)


def _kind(uri: str) -> fs.FileType:
    filesystem, path = resolve(uri)
    try:
        return filesystem.get_file_info([path])[0].type
    except OSError as error:
        raise UserError(f"cannot reach {uri}: {_one_line(error)}") from error


def _stat(info: fs.FileInfo) -> Stat | None:
    return Stat(info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
