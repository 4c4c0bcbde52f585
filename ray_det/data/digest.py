"""sha256 of Arrow columns, whatever the layout of their buffers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def digest(about: list[Any], table: pa.Table, names: Sequence[str]) -> str:
    """Hex, of JSON values and of these columns of the table."""
    sha = hashlib.sha256(json.dumps(about).encode())
    for name in names:
        sha.update(f"{name}\0".encode())
        _update(sha, table[name].combine_chunks())
    return sha.hexdigest()


def _update(sha: Any, array: pa.Array) -> None:
    """Feed lengths and values, whatever the nesting and the offsets of the buffers."""
    if array.null_count:
        array = pc.fill_null(array, "" if pa.types.is_string(array.type) else -1)
    if pa.types.is_list(array.type):
        _update(sha, pc.call_function("list_value_length", [array]))
        array = array.flatten()
    if pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    if pa.types.is_string(array.type):
        _update(sha, pc.call_function("binary_length", [array]))
        sha.update("".join(array.to_pylist()).encode())
    else:
        sha.update(array.to_numpy(zero_copy_only=False).tobytes())
