"""Whatever is read from outside, spoilt at random: it is read, or refused by an error of our own.

Seeds are real files of every kind. They are flipped, cut, spliced and filled with rubbish; a crash of the process, a
hang, much memory, or any exception but `UserError` is a failure.
"""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ray_det import cli
from ray_det.config import TrainJobConfig
from ray_det.data import coco
from ray_det.data.decode import decode
from ray_det.data.headers import read_headers
from ray_det.data.manifest import read_manifest, write_manifest
from ray_det.data.prepare import make
from ray_det.models.weights import read_weights
from ray_det.report.metrics_file import MetricsFile, read_records
from ray_det.report.wandb_log import read_history
from ray_det.train.checkpoint import Checkpoint, Snapshot, TrainState
from ray_det.train.job import RunFacts
from ray_det.types import ImageLimits, UserError
from tests.data.test_decode import BOMBS, CASES, LOSSY
from tests.models.zoo import CLASSES, FAMILIES, build

LIMITS = ImageLimits(pixels=1 << 22, bytes=1 << 22)
HANG = timedelta(seconds=30)
RUBBISH = [
    b"\0",
    b"\xff",
    b"\0\0\0\1",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\x80\0\0\0",
    b"\xff\xda",
    b"\xff\xd9",
]


@dataclass(frozen=True)
class Target:
    """What is spoilt, and what reads it; `words` mean something in its format."""

    seeds: list[bytes]
    read: Callable[[bytes], Any]
    words: tuple[bytes, ...] = ()


def spoilt(data: bytes, changes: list[tuple[str, float, float, bytes]]) -> bytes:
    content = bytearray(data)
    for kind, a, b, word in changes:
        i, j = sorted((int(a * len(content)), int(b * len(content))))
        if kind == "flip" and content:
            content[min(i, len(content) - 1)] ^= 1 << (j % 8)
        elif kind == "cut":
            del content[i:]
        elif kind == "remove":
            del content[i:j]
        elif kind == "repeat":
            content[j:j] = content[i:j]
        elif kind == "insert":
            content[i:i] = word
        elif kind == "replace":
            content[i : i + len(word)] = word
    return bytes(content)


def fuzz(target: Target, examples: int) -> None:
    kinds = st.sampled_from(["flip", "flip", "cut", "remove", "repeat", "insert", "replace"])
    words = st.sampled_from([*RUBBISH, *target.words]) | st.binary(min_size=1, max_size=8)
    share = st.floats(0, 1)

    @settings(max_examples=examples, deadline=HANG, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.sampled_from(target.seeds), st.lists(st.tuples(kinds, share, share, words), min_size=1, max_size=4))
    def run(seed: bytes, changes: list[tuple[str, float, float, bytes]]) -> None:
        try:
            target.read(spoilt(seed, changes))
        except UserError as error:
            assert str(error)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{grown:.0f} MiB"


def image_target(folder: Path) -> Target:
    def read(data: bytes) -> None:
        (folder / "x").write_bytes(data)
        header = read_headers((str(folder), ["x"]), LIMITS)[0]
        assert header.state == "ok" or header.problem
        pixels = decode(data, "x", LIMITS)
        assert header.state == "ok", f"decoded, but the header is {header}"
        assert pixels.shape == (header.height, header.width, 3)

    bombs = [data for data, _ in BOMBS.values() if len(data) < 20_000]
    return Target([data for data, _ in CASES.values()] + list(LOSSY.values()) + bombs, read)


COCO: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "a.jpg", "height": 48, "width": 64}, {"id": 3, "file_name": "sub/b.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4.5], "area": 10, "iscrowd": 1},
        {"id": 2, "image_id": 99, "category_id": 4, "bbox": [5, 6, 7, 8], "segmentation": [[1, 2, 3, 4, 5, 6]]},
    ],
    "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog", "supercategory": None}],
}


def coco_target(folder: Path) -> Target:
    words = (
        b"[" * 100_000,
        b"{",
        b"]",
        b'"',
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"null",
        b"\\ud800",
        b"true",
    )
    return Target([json.dumps(COCO).encode(), json.dumps(COCO, indent=1).encode()],
                  lambda data: coco.parse(data, "x.json"), words)  # fmt: skip


def manifest_target(folder: Path) -> Target:
    (folder / "a.jpg").write_bytes(LOSSY["jpeg"])
    (folder / "x.json").write_text(json.dumps(COCO))
    path = folder / "m.parquet"
    write_manifest(make(str(folder / "x.json"), str(folder))[0], path)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_manifest(path)

    return Target([path.read_bytes()], read, (b"ray_det.manifest", b"PAR1", b"ARROW:schema", b'"root": 5'))


def checkpoint_target(name: str) -> Callable[[Path], Target]:
    def make_target(folder: Path) -> Target:
        detector = build("fcos")
        optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.ndim == 1])
        torch.stack([p.sum() for p in detector.parameters()]).sum().backward()
        optimizer.step()
        config = {"model": FAMILIES["fcos"].model_dump()}
        Snapshot.of(detector, optimizer, TrainState(), RunFacts(config, CLASSES, {"train": "0"}, "id")).write(folder)
        opened, seed = Checkpoint.open(folder), (folder / name).read_bytes()
        if name == "state.json":
            (folder / "model.safetensors").unlink()
            (folder / "optimizer.pt").unlink()
            content = json.loads(seed)
            content["sha256"] = {}
            seed = json.dumps(content).encode()

        def read(data: bytes) -> None:
            (folder / name).write_bytes(data)
            if name == "state.json":
                Checkpoint.open(folder)
            elif name == "model.safetensors":
                opened.load_model(detector)
            else:
                opened.load_optimizer(optimizer)

        return Target([seed], read, (b"null", b"[]", b"{", b'"', b"9" * 5000, b"NaN", b"[" * 100_000))

    return make_target


def weights_target(folder: Path) -> Target:
    state = {"a.weight": torch.zeros(3, 2), "a.bias": torch.ones(3)}
    torch.save({"model": state}, folder / "zip.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "x.safetensors")

    def read(data: bytes) -> None:
        path = folder / ("y.safetensors" if data[8:9] == b"{" else "y.pth")
        path.write_bytes(data)
        read_weights(str(path))

    return Target([(folder / name).read_bytes() for name in ("zip.pth", "old.pth", "x.safetensors")], read)


def yaml_target(folder: Path) -> Target:
    config = {"model": FAMILIES["d_fine"].model_dump(), "data": {"train": "a.json", "multi_scale": [320, 640]}}
    text = cli.to_yaml(TrainJobConfig.model_validate(config)).encode()
    words = (b"!!python/object/apply:os.system [id]", b"&a ", b"*a", b"<<: *a", b"!!binary aaaa", b"!!set {a, b}",
             b"!!timestamp 2024-01-01", b"? [a, b] : c", b"{", b"[" * 3000, b"- " * 3000, b"9" * 5000, b"1e999999",
             b"\n", b": ", b"'", b'"', b"|\n", b"---\n", b"!!float x", b"!!int x", b"!!bool")  # fmt: skip
    return Target([text, b"seed: 1\noptim: {lr: 1e-3}\n"],
                  lambda data: cli.from_yaml(TrainJobConfig, data.decode("utf-8", "replace")), words)  # fmt: skip


def metrics_target(folder: Path) -> Target:
    path = folder / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(4):
        file.append(step, {"train/batch_loss": 1.5, "val/AP": float("nan")})
    file.close()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = list(read_records(path))
        again = MetricsFile(path, len(found))
        again.append(9, {"train/batch_loss": 1.0})
        again.close()

    return Target([path.read_bytes()], read, (b"\n", b"[" * 100_000 + b"\n", b"9" * 5000, b'"'))


def wandb_target(folder: Path) -> Target:
    """A log in the format of leveldb, as wandb writes it."""
    from wandb.proto import wandb_internal_pb2 as pb

    log = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
    for step in range(3):
        record: Any = pb.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.history.step.num = step
        for key, value in (("train/batch_loss", "1.5"), ("global_step", str(step))):
            item = record.history.item.add()
            item.key, item.value_json = key, value
        content = record.SerializeToString()
        log += struct.pack("<IHB", 0, len(content), 1) + content

    def read(data: bytes) -> None:
        (folder / "x.wandb").write_bytes(data)
        list(read_history(folder / "x.wandb"))

    read(log)
    return Target([log], read, (b"\xff" * 7, b"[" * 100_000, b"9" * 5000))


TARGETS: dict[str, Callable[[Path], Target]] = {
    "image": image_target,
    "coco": coco_target,
    "manifest": manifest_target,
    "state.json": checkpoint_target("state.json"),
    "model.safetensors": checkpoint_target("model.safetensors"),
    "optimizer.pt": checkpoint_target("optimizer.pt"),
    "weights": weights_target,
    "yaml": yaml_target,
    "metrics": metrics_target,
    "wandb": wandb_target,
}
LENGTHS = {"image": (200, 20_000), "model.safetensors": (20, 1500), "optimizer.pt": (20, 1500)}


@pytest.mark.parametrize("name", TARGETS)
def test_spoilt_input_is_read_or_refused(name, tmp_path):
    fuzz(TARGETS[name](tmp_path), LENGTHS.get(name, (40, 0))[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_much_spoilt_input_is_read_or_refused(name, tmp_path):
    fuzz(TARGETS[name](tmp_path), LENGTHS.get(name, (0, 5000))[1])
