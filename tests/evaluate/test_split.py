"""What an evaluation loads."""

from __future__ import annotations

from ray_det.config import DatasetConfig
from ray_det.data.collate import load
from ray_det.data.manifest import Place
from ray_det.evaluate.analysis_files import write_analysis
from ray_det.evaluate.results import Results
from ray_det.evaluate.split import evaluation_shard
from ray_det.types import Detections
from tests.evaluate.test_coco_eval import manifest_of, noisy


def test_a_storage_out_of_reach_is_waited_for_as_long_as_asked(small_coco, tmp_path, monkeypatch):
    manifest, data = manifest_of(small_coco["val"], tmp_path / "cache"), DatasetConfig(image_size=64)
    waited_s, read = [], Place.read

    def spied(self: Place, max_bytes: int, patience_s: float) -> bytes:
        waited_s.append(patience_s)
        return read(self, max_bytes, patience_s)

    monkeypatch.setattr(Place, "read", spied)
    load(evaluation_shard(manifest, data, batch_size=2, divisor=32, patience_s=7))
    assert waited_s == [7] * len(manifest)
    found: list[Detections] = noisy(manifest)
    write_analysis(tmp_path, "val", manifest, Results.of(found), data, patience_s=5)
    assert set(waited_s[len(manifest) :]) == {5}
