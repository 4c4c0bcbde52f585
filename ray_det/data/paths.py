"""Paths and URIs as texts: nothing here is opened, and only `is_outside` and `real` look at the disk."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable

from ray_det.types import UserError
from ray_det.uris import plain

IMAGE_SUFFIXES = tuple(
    f".{kind}" for kind in "jpg jpeg jfif png bmp gif tif tiff webp avif mpo jp2 j2k pbm pgm pnm ppm".split()
)


def has_scheme(path: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def absolute(path: str) -> str:
    """A URI as it is (without a final slash), `file://` and plain paths as an absolute local path."""
    path = plain(path)
    return path.rstrip("/") if has_scheme(path) else os.path.abspath(os.path.expanduser(path))


def real(path: str) -> str:
    """As `absolute`, and a local path without symbolic links."""
    path = absolute(path)
    return path if has_scheme(path) else os.path.realpath(path)


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


def images(names: list[str]) -> list[str]:
    """Those of the names that may be images, by their suffix."""
    return [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
