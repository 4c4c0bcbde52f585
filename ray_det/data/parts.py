"""Files of which a few parts are read, where an outage must not pass for a broken file."""

from __future__ import annotations

import errno
import io
import os
from typing import Any

import pyarrow as pa

from ray_det.data import files
from ray_det.data.paths import has_scheme
from ray_det.retry import patiently
from ray_det.storage import StorageError

WHOLE_BYTES = 256 << 10
"""Smaller remote files are taken whole where parts are asked for: every part would be one more answer to wait for."""
BUFFER_BYTES = 64 << 10
"""Of larger ones at a time."""


def open_for_parts(path: str, max_bytes: int) -> Any:
    """As `files.open_bounded`, for many small reads here and there, also where a storage is out of reach for a while.

    Raises:
        StorageError: a remote storage stayed out of reach or refuses; of later reads too.
    """

    def remote() -> Any:
        file = files.open_bounded(path, max_bytes)
        if file.size() > WHOLE_BYTES:
            return io.BufferedReader(_Parts(path, file), BUFFER_BYTES)
        with file:
            return io.BytesIO(file.read())

    if not has_scheme(path):
        return files.open_bounded(path, max_bytes)
    try:
        return patiently(remote)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise files.unreadable(path, error) from error


class _Parts(io.RawIOBase):
    """A remote file whose every read is tried again. What fails for good is no OSError: broken images raise those."""

    def __init__(self, path: str, file: pa.NativeFile) -> None:
        self._path, self._file, self._size, self._at = path, file, file.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError(f"there is no byte {at}")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        content = self._read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self._read(self._size)

    def _read(self, most: int) -> bytes:
        length = min(most, self._size - self._at)  # object stores refuse what is behind the end
        try:
            content = patiently(lambda: self._file.read_at(length, self._at)) if length > 0 else b""
        except OSError as error:
            raise files.unreadable(self._path, error) from error
        self._at += len(content)
        return content

    def close(self) -> None:
        self._file.close()
        super().close()


def is_outage(error: Exception) -> bool:
    """Whether an error is of the place where a file lies, not of what the file holds or is: it may be fine.

    Errors of Pillow have no number; seeking where a broken header points, and odd names, have those below.
    """
    of_the_file = (None, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
    return isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno not in of_the_file)
