"""Files that would run code when they are read carelessly: each is refused by one clear error, and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ray_det import cli
from ray_det.config import TrainJobConfig
from ray_det.data.manifest import FORMAT, SCHEMA, read_manifest
from ray_det.models.build import build_detector
from ray_det.train.checkpoint import Checkpoint, Snapshot, TrainState, _sha256
from ray_det.train.job import RunFacts
from ray_det.types import UserError
from tests.models.zoo import CLASSES, FAMILIES, build


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def payload(tmp_path):
    """A payload that works, and that must not have run at the end."""
    target = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(target)))
    assert target.is_dir()
    target.rmdir()
    yield Payload(target)
    assert not target.exists(), "the payload ran"


def plant(path: Path, payload: Payload, how: str) -> None:
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state": {}, "param_groups": payload}))
    elif how == "torch":
        torch.save({"model": {"a": torch.zeros(2)}, "state": payload}, path)
    else:
        torch.save({"model": {"a": torch.zeros(2)}, "state": payload}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("how", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
def test_in_a_checkpoint(payload, tmp_path, name, how):
    """With the right SHA-256: whoever plants a file can write that too."""
    detector = build("fcos")
    optimizer = torch.optim.AdamW(detector.parameters())
    facts = RunFacts({"model": FAMILIES["fcos"].model_dump()}, CLASSES, {}, "id")
    Snapshot.of(detector, optimizer, TrainState(), facts).write(tmp_path / "c")
    plant(tmp_path / "c" / name, payload, how)
    content = json.loads((tmp_path / "c" / "state.json").read_text())
    content["sha256"][name] = _sha256(tmp_path / "c" / name)
    (tmp_path / "c" / "state.json").write_text(json.dumps(content))
    opened = Checkpoint.open(tmp_path / "c")
    with pytest.raises(UserError, match=f"^broken checkpoint: .*{name}: ") as caught:
        opened.load_optimizer(optimizer) if name == "optimizer.pt" else opened.load_model(detector)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("family", ["fcos", "d_fine"])
def test_as_weights(payload, tmp_path, family, name, how):
    plant(tmp_path / name, payload, how)
    config = FAMILIES[family].model_copy(update={"weights": str(tmp_path / name)})
    with pytest.raises(UserError, match=rf"weights file .*{name} (holds pickled objects|cannot be read)") as caught:
        build_detector(config, CLASSES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_in_a_folder_of_transformers(payload, tmp_path, name):
    folder = tmp_path / "model"
    net: Any = build("d_fine").get_submodule("net")
    net.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    plant(folder / name, payload, "torch")
    config = FAMILIES["d_fine"].model_copy(update={"name": f"transformers/{folder}", "weights": "default"})
    with pytest.raises(UserError, match="the weights in the folder .* cannot be read") as caught:
        build_detector(config, CLASSES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("extension", ["arrow.py_extension_type", "ray.data.arrow_tensor", "made.up"])
def test_as_a_manifest_with_an_extension_type(payload, tmp_path, extension):
    """Arrow's Python types once were pickles in a column's metadata."""
    metadata = {"ARROW:extension:name": extension, "ARROW:extension:metadata": pickle.dumps(payload)}
    fields = [f.with_metadata(metadata) if f.name == "uri" else f for f in SCHEMA]
    about = {"format": FORMAT, "shards": None, "places": "", "classes": [], "root": "/", "source": "x", "hash": ""}
    schema = pa.schema(fields, metadata={"ray_det.manifest": json.dumps(about)})
    pq.write_table(schema.empty_table(), tmp_path / "m.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyarrow says that it does not know or load the type
        with pytest.raises(UserError, match=r"m\.parquet (is a damaged manifest|cannot be read as a manifest)"):
            read_manifest(tmp_path / "m.parquet")


def test_as_a_manifest_that_is_a_pickle(payload, tmp_path):
    (tmp_path / "m.parquet").write_bytes(pickle.dumps(payload))
    with pytest.raises(UserError, match=r"m\.parquet cannot be read as a manifest"):
        read_manifest(tmp_path / "m.parquet")


def test_a_manifest_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    about = {"format": FORMAT, "shards": None, "places": "", "classes": [], "root": "/", "source": "x", "hash": ""}
    rows = pa.table({"image_id": pa.array([0]).take(pa.array([0] * 3_000_000))})
    pq.write_table(rows.replace_schema_metadata({"ray_det.manifest": json.dumps(about)}), tmp_path / "m.parquet")
    with pytest.raises(
        UserError, match=r"m\.parquet cannot be read as a manifest \(its \d+ bytes unpack to more than 64"
    ):
        read_manifest(tmp_path / "m.parquet")


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.mkdir [{0}]",
        "model: {{config: {{a: !!python/object/new:os.mkdir [[{0}]]}}}}",
        "!!python/object/apply:os.mkdir [{0}]: 1",
        "seed: !!python/name:os.mkdir",
        "seed: !!python/module:os",
    ],
)
def test_as_a_yaml_tag(payload, tmp_path, text):
    with pytest.raises(UserError, match="^x.yaml: not valid YAML.*could not determine a constructor for the tag"):
        cli.from_yaml(TrainJobConfig, text.format(payload.path), source="x.yaml")


def test_yaml_of_a_few_lines_is_not_billions_of_values():
    lines = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(UserError, match=r"not valid YAML in line 2: aliases \(\*name\) are not read"):
        cli.from_yaml(TrainJobConfig, "\n".join(lines))
    for text, message in (
        ("model: {config: {a: &a [*a]}}", "aliases"),
        ("model: {config: {a: " + "[" * 5000, "nested too deeply"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("seed: !!float x", "not valid YAML"),
        ("model: {config: {!!binary aGk=: 1}}", "could not determine a constructor"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            cli.from_yaml(TrainJobConfig, text)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
