"""Annotations of any known form as the columns of a COCO file, and where their images usually lie."""

from __future__ import annotations

import posixpath

from ray_det.data import coco, files, paths, voc, yolo
from ray_det.data.coco import CocoData


def read(source: str, split: str) -> tuple[CocoData, list[str]]:
    """The annotations, and the roots that their file names may start from, the likeliest first.

    Args:
        source: a COCO JSON, a VOC folder or a list of names in one (.txt), or a YOLO data.yaml.
        split: the entry of a data.yaml: train, val or test.

    Raises:
        UserError: no such file, or a broken one.
    """
    if source.endswith((".yaml", ".yml")):
        return yolo.read(source, split)
    path = paths.absolute(source)
    if path.endswith(".txt") or (not path.endswith(".json") and files.is_folder(f"{path}/{voc.ANNOTATIONS}")):
        return voc.read(source)
    return coco.parse(files.read_bytes(source), source), _beside(path)


def _beside(source: str) -> list[str]:
    folder, stem = paths.parent(source), posixpath.basename(source).removesuffix(".json")
    # COCO's own layout: annotations/instances_val2017.json beside val2017/
    official = f"{paths.parent(folder)}/{stem.rsplit('_', 1)[-1]}"
    return [f"{folder}/images", folder, official, f"{folder}/{stem}"]
