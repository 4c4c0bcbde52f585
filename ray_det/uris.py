"""What `scheme://…` stands for: the file system that pyarrow opens, and the path on it."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import unquote

from pyarrow import fs

from ray_det.retry import reason
from ray_det.types import UserError

Opened = tuple[fs.FileSystem, str]
"""A file system and a path on it."""


def plain(location: str) -> str:
    """A `file://` URI, quoted as by `Path.as_uri`, as the path that it stands for; anything else as it is."""
    path = location.removeprefix("file://")
    return location if path == location else unquote(path)


def open_root(scheme: str, host: str) -> Opened:
    return fs.FileSystem.from_uri(f"{scheme}://{host}/")


def resolve(uri: str, open_root: Callable[[str, str], Opened] = open_root) -> Opened:
    """The file system of a URI and the path on it, which is taken as it is written, but for `file://`.

    Raises:
        UserError: pyarrow knows no such file system, or cannot reach it.
    """
    if (path := plain(uri)) != uri:
        return fs.LocalFileSystem(), path.rstrip("/") or "/"
    scheme, rest = uri.split("://", 1)
    host, _, path = rest.partition("/")
    try:
        # Of a longer URI pyarrow would unquote the path, cut it at # and ?, and refuse spaces.
        system, base = open_root(scheme, host)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot open {uri}: {reason(error)}") from error
    return system, f"{base.rstrip('/')}/{path}".rstrip("/")
