"""What an image file says of itself before its pixels are decoded: size, EXIF orientation, mode.

Sizes are those of the stored pixels. An EXIF orientation is read in order to be reported, it is never applied.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

from PIL import Image

from ray_det.data import files, paths
from ray_det.data.decode import check_scans, decode, open_image, orientation, reason, stored_size
from ray_det.data.parts import is_outage, open_for_parts
from ray_det.types import DEFAULT_LIMITS, ImageLimits, UserError

CHUNK_FILES = 256

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
    several: bool = False  # frames or pages


def map_in_threads(function: Callable[[HeaderChunk], list[Header]], chunks: list[HeaderChunk]) -> list[list[Header]]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, chunks))


def scan(
    root: str, names: list[str], map_chunks: MapChunks = map_in_threads, limits: ImageLimits = DEFAULT_LIMITS
) -> list[Header]:
    """The header of every file, in order; a file over the limits is unreadable.

    Raises:
        UserError: a name leaves the root, by itself or through a symbolic link; as `read_headers`.
        StorageError: as `read_headers`.
    """
    paths.require_inside(root, names)
    chunks = [(root, names[i : i + CHUNK_FILES]) for i in range(0, len(names), CHUNK_FILES)]
    headers = [header for part in map_chunks(partial(read_headers, limits=limits), chunks) for header in part]
    for name, header in zip(names, headers, strict=True):
        if header.state == "outside":
            raise UserError(f"file_name {name!r} is refused: it is a symbolic link that leaves {root}")
    return headers


def read_headers(chunk: HeaderChunk, limits: ImageLimits = DEFAULT_LIMITS) -> list[Header]:
    """Open the header of every file of a chunk; never raises for what a file holds.

    Raises:
        UserError: a file may not or cannot be read, whatever it holds.
        StorageError: a remote storage stayed out of reach, or refuses.
    """
    root, names = chunk
    places = [paths.join(root, name) for name in names]
    if not paths.has_scheme(root):
        return [_read_header(root, place, limits) for place in places]  # threads would wait for the interpreter alone
    return list(_readers().map(lambda place: _read_header(root, place, limits), places))


@lru_cache
def _readers() -> ThreadPoolExecutor:
    """Of all chunks that this process checks."""
    return ThreadPoolExecutor(files.READS_AT_ONCE, "headers")


def _read_header(root: str, path: str, limits: ImageLimits) -> Header:
    if paths.is_outside(path, root):
        return Header("outside")
    try:
        with open_for_parts(path, limits.bytes) as file:
            return _checked(file, path, limits)
    except (FileNotFoundError, NotADirectoryError):
        return Header("missing", problem="no such file")
    except (OSError, ValueError) as error:
        if is_outage(error):
            raise files.unreadable(path, error) from error
        return Header("unreadable", problem=reason(error))


def _checked(file: Any, path: str, limits: ImageLimits) -> Header:
    try:
        with open_image(file, limits) as image:
            height, width = stored_size(image)
            header = Header("ok", height, width, orientation(image), image.mode, several=_several(image))
            whole = _ends_well(file, image.format)
            if not whole or "progressive" in image.info:
                file.seek(0)
                content = file.read()
                check_scans(content)
                if not whole:
                    decode(content, path, limits)  # decides: files without an end mark may be whole
            return header
    except UserError as error:
        return Header("unreadable", problem=reason(error.__cause__ or error))
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken header
        if is_outage(error):
            raise
        return Header("unreadable", problem=reason(error))


def _several(image: Image.Image) -> bool:
    """Whether there are more frames or pages than the first."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception as error:  # what follows the first frame may be broken
        if is_outage(error):
            raise
        return True


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
