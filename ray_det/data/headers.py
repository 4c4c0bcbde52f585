"""What an image file says of itself before its pixels are decoded: size, EXIF orientation, mode.

Sizes are those of the stored pixels. An EXIF orientation is read in order to be reported, it is never applied.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from PIL import Image

from ray_det.data import files
from ray_det.types import UserError

CHUNK_FILES = 256
_ORIENTATION_TAG = 0x0112

HeaderChunk = tuple[str, list[str]]
"""(root, names under it): what one call of `read_headers` checks."""
MapChunks = Callable[[Callable[[HeaderChunk], list["Header"]], list[HeaderChunk]], list[list["Header"]]]
"""`list(map(function, chunks))`, done in parallel by whatever means."""


class Header(NamedTuple):
    state: Literal["ok", "missing", "unreadable", "outside"]
    height: int = 0  # stored pixels
    width: int = 0
    orientation: int = 1  # EXIF, 1..8; 1: as stored
    mode: str = "RGB"  # Pillow's name
    problem: str = ""  # why it is not ok


def map_in_threads(function: Callable[[HeaderChunk], list[Header]], chunks: list[HeaderChunk]) -> list[list[Header]]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, chunks))


def scan(root: str, names: list[str], map_chunks: MapChunks = map_in_threads) -> list[Header]:
    """The header of every file, in order.

    Raises:
        UserError: a name leaves the root, by itself or through a symbolic link.
    """
    for name in names:
        if reason := leaves_root(name):
            raise UserError(f"file_name {name!r} is refused: {reason}; it must name a file under {root}")
    chunks = [(root, names[i : i + CHUNK_FILES]) for i in range(0, len(names), CHUNK_FILES)]
    headers = [header for part in map_chunks(read_headers, chunks) for header in part]
    for name, header in zip(names, headers, strict=True):
        if header.state == "outside":
            raise UserError(f"file_name {name!r} is refused: it is a symbolic link that leaves {root}")
    return headers


def leaves_root(name: str) -> str | None:
    """Why a `file_name` may not be used, or None. Symbolic links are seen by `read_headers`."""
    if "\0" in name:
        return "it has a NUL character"
    if "\\" in name:
        return "it has a backslash (COCO separates folders by '/')"
    if files.has_scheme(name) or re.match(r"[A-Za-z]+:/", name):
        return "it is a URL"
    if posixpath.isabs(name):
        return "it is an absolute path"
    if ".." in name.split("/"):
        return "it has '..'"
    return None


def read_headers(chunk: HeaderChunk) -> list[Header]:
    """Open the header of every file of a chunk; never raises for what a file holds."""
    root, names = chunk
    local_root = None if files.has_scheme(root) else os.path.realpath(root)
    return [_read_header(files.join(root, name), local_root) for name in names]


def _read_header(path: str, local_root: str | None) -> Header:
    if local_root is not None:
        real = os.path.realpath(path)
        if os.path.commonpath([real, local_root]) != local_root:
            return Header("outside")
    try:
        with files.open_binary(path) as file, Image.open(file) as image:
            header = Header("ok", image.height, image.width, _orientation(image), image.mode)
            if not _ends_well(file, image.format):
                image.load()  # decides: files without an end mark may be whole
            return header
    except (FileNotFoundError, NotADirectoryError):
        return Header("missing", problem="no such file")
    except Image.UnidentifiedImageError:
        return Header("unreadable", problem="not an image")
    except Image.DecompressionBombError:  # the loader has the same guard
        return Header("unreadable", problem="more pixels than the decoder accepts")
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken header
        return Header("unreadable", problem=_reason(error))


def _ends_well(file: Any, kind: str | None) -> bool:
    """Whether a JPEG or PNG has its end mark at the end: most cut files show here, without decoding any whole one."""
    mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}.get(kind or "")
    if mark is None:
        return True
    position, size = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 64))
    tail = file.read(64)
    file.seek(position)
    return tail.rstrip(b"\0\r\n ").endswith(mark)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 for TIFF, whose own tag Pillow has applied to the size already."""
    if "exif" not in image.info or image.format == "TIFF":
        return 1
    try:
        value: Any = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _reason(error: Exception) -> str:
    """One line without the path, which depends on where the data lies."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {text}".splitlines()[0]
