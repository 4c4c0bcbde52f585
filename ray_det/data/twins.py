"""The same picture in two splits, by content: a model is then measured on what it was trained on."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from ray_det.data import files
from ray_det.data.manifest import Manifest
from ray_det.types import UserError


class Twin(NamedTuple):
    """Files of equal bytes in two splits."""

    split: str
    file: str
    other_split: str
    other_file: str

    def __str__(self) -> str:
        return f"{self.other_file} of {self.other_split} is {self.file} of {self.split}"


def find_twins(manifests: dict[str, Manifest], cache: Path) -> tuple[list[Twin], Path]:
    """For every two splits: the images of the later one that are in the other too, with the first that is equal.

    Only what could be equal, by bytes, height and width, is read, and once: the outcome is kept.

    Returns:
        The twins, and the JSON file that lists them.
    """
    keys = {split: _keys(manifest) for split, manifest in manifests.items()}
    path = cache / f"twins-{_name(manifests, keys)}.json"
    try:
        return [Twin(**twin) for twin in json.loads(path.read_text())], path
    except (OSError, ValueError, TypeError):
        pass  # not there, or not whole
    digests = {
        split: _digests(manifests[split], np.flatnonzero((own != 0) & _is_in_another(split, keys)))
        for split, own in keys.items()
    }
    found: list[Twin] = []
    for split, other in combinations(keys, 2):
        files_by_digest = {digest: file for file, digest in reversed(digests[split])}
        known = ((file, files_by_digest.get(digest)) for file, digest in digests[other])
        found += [Twin(split, twin, other, file) for file, twin in known if twin is not None]
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps([twin._asdict() for twin in found], indent=1))
    return found, path


def _keys(manifest: Manifest) -> np.ndarray:
    """int64 per row, the same for images of equal bytes and size; 0 where the bytes are not known."""
    length, height, width = (
        pc.fill_null(manifest.table[name], 0).to_numpy().astype(np.int64) for name in ("length", "height", "width")
    )
    return np.where(length > 0, length * 1_000_003 + height * 9_973 + width, 0)


def _name(manifests: dict[str, Manifest], keys: dict[str, np.ndarray]) -> str:
    """Changes with the data, with where it is, and with the length of any image."""
    about = [(split, m.hash, m.root, m.shards) for split, m in manifests.items()]
    sha = hashlib.sha256(json.dumps(about).encode())
    for key in keys.values():
        sha.update(key.tobytes())
    return sha.hexdigest()[:32]


def _is_in_another(split: str, keys: dict[str, np.ndarray]) -> np.ndarray:
    others = [keys[other] for other in keys if other != split]
    return np.isin(keys[split], np.concatenate(others)) if others else np.zeros(len(keys[split]), bool)


def _digests(manifest: Manifest, rows: np.ndarray) -> list[tuple[str, str]]:
    """(file, sha256 of its bytes) of the rows that can be read."""

    def digest(row: int) -> tuple[str, str] | None:
        try:
            content = manifest.place(row).read()
        except UserError:  # whoever needs the image says so
            return None
        return manifest.table["uri"][row].as_py(), hashlib.sha256(content).hexdigest()

    with ThreadPoolExecutor(max(files.READS_AT_ONCE, os.cpu_count() or 1)) as pool:
        return [pair for pair in pool.map(digest, rows.tolist()) if pair]
