"""Which classes of a data set are used, and under which names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ray_det.data.coco import CocoData
from ray_det.types import ClassList, UserError


@dataclass(frozen=True)
class Selection:
    """First classes get new names, then only some are kept; all that have one name then are one class."""

    classes: tuple[str, ...] = ()  # names to keep; empty: all
    rename: Mapping[str, str] = field(default_factory=dict)  # old name -> new

    def __bool__(self) -> bool:
        return bool(self.classes or self.rename)


def select(data: CocoData, selection: Selection) -> CocoData:
    """The data set with these classes alone. Images stay, boxes of other classes go.

    A class keeps its COCO id, a merged one the smallest of its ids. Annotations of categories that the file does not
    list stay as they are, for the preflight to find.

    Raises:
        UserError: a name that the data set does not have.
    """
    if not selection:
        return data
    _require_known("rename", selection.rename, data.classes.names, data.source)
    names = [selection.rename.get(name, name) for name in data.classes.names]
    _require_known("classes", selection.classes, names, data.source)
    id_of: dict[str, int] = {}
    for name, category_id in zip(names, data.classes.category_ids, strict=True):  # ids ascend
        if not selection.classes or name in selection.classes:
            id_of.setdefault(name, category_id)
    ids_C = np.array(data.classes.category_ids, np.int64)
    at_M = np.minimum(np.searchsorted(ids_C, data.category_of_M), len(ids_C) - 1)
    known_M = ids_C[at_M] == data.category_of_M
    kept_M = ~known_M | np.array([name in id_of for name in names])[at_M]
    new_ids_C = np.array([id_of.get(name, 0) for name in names], np.int64)
    moved = replace(
        data,
        classes=ClassList.from_json([{"id": i, "name": name} for name, i in id_of.items()]),
        category_of_M=np.where(known_M, new_ids_C[at_M], data.category_of_M),
    )
    return replace(moved, **{name: column[kept_M] for name, column in vars(moved).items() if "_M" in name})


def _require_known(option: str, wanted: Iterable[str], known: Iterable[str], source: str) -> None:
    known = list(dict.fromkeys(known))
    for name in wanted:
        if name not in known:
            nearest = " or ".join(map(repr, difflib.get_close_matches(name, known, n=2, cutoff=0)))
            raise UserError(f"{option}: {source} has no class {name!r} (nearest: {nearest})")
