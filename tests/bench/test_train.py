"""The arms of `jobs/bench.py train` do the same work, and what is read from their runs is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import RTDetrImageProcessor

from ray_det import cli
from ray_det.bench import memory, peer_reference, peer_trainer, photos, train
from ray_det.bench.memory import Weight
from ray_det.bench.task import MARK, MODELS, Stopwatch, Task, environment, subset
from ray_det.config import TrainJobConfig
from ray_det.data.prepare import prepare
from ray_det.models.build import build_detector
from ray_det.models.winograd import WinogradConv2d
from ray_det.types import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return photos.draw(tmp_path_factory.mktemp("photos") / "drawn", photos.coco_sizes(12))


def task(drawn: Path | None = None, **changes) -> Task:
    root = str(drawn.parent) if drawn else ""
    given = {"data": str(drawn), "root": root, "classes": 80, "model": MODELS["fcos"], "image_size": 64}
    given |= {"batch_size": 2, "steps": 4, "skipped": 2, "precision": "fp32", "threads": 1, "loaders": 1}
    return Task.model_validate(given | changes)


def test_photographs_are_as_costly_as_cocos_and_drawn_once(drawn, tmp_path):
    manifest, report = prepare(str(drawn), None, tmp_path)
    assert report and not report.notable and manifest.counts["trainable_images"] == 12
    sizes = set(zip(*(manifest.table[side].to_pylist() for side in ("height", "width")), strict=True))
    assert len(sizes) > 3 and sizes <= set(photos.SIZES)
    pixels = sum(h * w for h, w in zip(*(manifest.table[k].to_pylist() for k in ("height", "width")), strict=True))
    assert 4 < 8 * sum(manifest.table["length"].to_pylist()) / pixels < 5.5
    before = {file: file.stat().st_mtime_ns for file in drawn.parent.iterdir()}
    assert photos.draw(drawn.parent, photos.coco_sizes(12)) == drawn
    assert {file: file.stat().st_mtime_ns for file in drawn.parent.iterdir()} == before


def test_a_subset_has_what_can_be_trained_on_with_contiguous_labels(small_coco, tmp_path):
    manifest, _ = prepare(str(small_coco["train"]), None, tmp_path)
    chosen = json.loads(subset(manifest, 10, tmp_path).read_text())
    assert len(chosen["images"]) == len({image["id"] for image in chosen["images"]}) == 10
    assert [c["id"] for c in chosen["categories"]] == [0, 1, 2]
    whole = json.loads(small_coco["train"].read_text())
    ids, names = {c["name"]: c["id"] for c in whole["categories"]}, {c["id"]: c["name"] for c in chosen["categories"]}
    kept = {image["id"] for image in chosen["images"]}
    expected = [a for a in whole["annotations"] if a["image_id"] in kept and not a["iscrowd"]]
    got = [(a["image_id"], ids[names[a["category_id"]]], a["bbox"]) for a in chosen["annotations"]]
    assert sorted(got) == sorted((a["image_id"], a["category_id"], a["bbox"]) for a in expected)
    with pytest.raises(UserError, match="16 images can be trained on, 17 are needed"):
        subset(manifest, 17, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_peers_train_the_same_network(name):
    one = task(model=MODELS[name])
    peer = peer_trainer if name == "dfine" else peer_reference
    ours, _ = build_detector(one.model, one.class_list, padding="mean")

    def shapes(net: torch.nn.Module) -> dict[str, tuple]:
        return {name: (p.shape, p.requires_grad) for name, p in net.named_parameters()}

    theirs = peer.network(one)
    assert shapes(theirs) == shapes(ours.net)  # pyright: ignore[reportArgumentType]
    assert not any(isinstance(m, WinogradConv2d) for m in theirs.modules())  # which would be ours
    if name == "dfine":
        assert 9e6 < sum(p.numel() for p in ours.parameters()) < 11e6  # 10 M, says the paper


def test_the_trainers_batches_have_the_canvas_and_boxes_of_ours():
    wide, tall = Image.new("RGB", (200, 100), (255, 0, 0)), Image.new("RGB", (100, 300), (255, 0, 0))
    boxes = {"id": 1, "iscrowd": 0, "area": 200.0, "category_id": 5, "bbox": [20.0, 10.0, 40.0, 30.0]}
    processor = RTDetrImageProcessor(size={"max_height": 64, "max_width": 64}, do_pad=True)
    batch = peer_trainer.collate([(wide, [boxes]), (tall, [])], processor=processor, image_size=64)
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    assert batch["pixel_mask"][0].sum() == 64 * 32 and batch["pixel_mask"][1].sum() == 64 * 21
    # 0.32 of the size, then shares of the canvas: x 6.4..19.2, y 3.2..12.8
    expected = [12.8 / 64, 8 / 64, 12.8 / 64, 9.6 / 64]
    np.testing.assert_allclose(batch["labels"][0]["boxes"][0], expected, atol=1e-6)
    assert batch["labels"][0]["class_labels"].tolist() == [5] and not len(batch["labels"][1]["boxes"])


def test_flips_mirror_boxes():
    image = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(5, 20, 3))
    boxes = [{"bbox": [2.0, 1.0, 5.0, 3.0], "category_id": 4}]
    mirrored, moved = peer_trainer.flipped(image, boxes, probability=1.0)
    assert moved[0]["bbox"] == [13.0, 1.0, 5.0, 3.0] and moved[0]["category_id"] == 4
    pixels, target = peer_reference.to_tensors(image, boxes, probability=1.0, first_label=1)
    assert target["boxes"].tolist() == [[13.0, 1.0, 18.0, 4.0]] and target["labels"].tolist() == [5]
    for flipped in (np.asarray(mirrored), (255 * pixels).round().byte().permute(1, 2, 0).numpy()):
        np.testing.assert_array_equal(flipped, np.asarray(image)[:, ::-1])
    assert peer_trainer.flipped(image, boxes, probability=0.0) == (image, boxes)


def test_the_references_batches_are_of_one_group_each():
    aspects = [0.66, 2.1, 1.33] * 10
    batches = list(peer_reference.GroupedBatches(aspects, task(batch_size=4, steps=9)))
    assert len(batches) == 9 and all(len(batch) == 4 for batch in batches)
    assert all(len({aspects[i] for i in batch}) == 1 for batch in batches)
    first_pass = [i for batch in batches[:6] for i in batch]
    assert len(set(first_pass)) == len(first_pass)


def test_the_jobs_command_line_says_what_the_task_says(drawn, tmp_path):
    one = task(drawn, model=MODELS["dfine"])
    _, job, *argv = train.command(one, tmp_path)
    config, _ = cli.parse(TrainJobConfig, argv, description="", recipes=True, default_recipe=lambda given: "finetune")
    assert Path(job).is_file()
    assert config.model == one.model
    assert (config.optim.lr, config.optim.weight_decay, config.train.precision) == (1e-4, 1e-4, "fp32")
    assert (config.train.epochs, config.train.global_batch_size, config.workers.threads) == (1, 2, 1)
    augment = config.augment
    assert (augment.flip, augment.scale, augment.brightness, augment.saturation) == (0.5, (1, 1), 0, 0)


def test_first_steps_are_not_counted(tmp_path, monkeypatch, capsys):
    rates = [1.0, 1.0, 2.0, 4.0]
    records = [{"global_step": i, "train/batch_loss": 1.0, "train/images_per_s": r} for i, r in enumerate(rates)]
    (tmp_path / "run").mkdir()
    lines = [json.dumps(r) + "\n" for r in [*records, {"global_step": 4, "train/epoch_avg_loss": 1.0}]]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    monkeypatch.setattr(train, "run_process", lambda command: "")
    assert train.rate(task(), tmp_path) == pytest.approx(2 * 2 / (2 / 2 + 2 / 4))  # 2 steps of 2 images
    with pytest.raises(RuntimeError, match="4 steps instead of 5"):
        train.rate(task(steps=5), tmp_path)
    clock = iter([10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch(task(), torch.device("cpu"))
    for _ in range(4):
        watch.step()
    assert capsys.readouterr().out == f"{MARK}1.0\n"


def test_a_weighed_run_ends_with_its_benchmark(monkeypatch):
    seen = []

    def ended(driver):
        seen.append(driver)
        raise SystemExit(143)

    monkeypatch.setattr(memory, "_sample", ended)
    with pytest.raises(SystemExit):
        memory.watched([sys.executable, "-c", "import time; time.sleep(60)"])
    assert [driver.is_running() for driver in seen] == [False]


def test_processes_have_roles():
    assert memory.role(["ray::RayTrainWorker.init_train_context"]) == "train worker"
    assert memory.role(["ray::ReadRange->MapBatches(load_block)"]) == memory.role(["ray::IDLE"]) == "loaders"
    assert memory.role(["ray::DatasetManager"]) == "Ray's actors"
    assert memory.role(["/lib/ray/core/src/ray/raylet/raylet", "--x"]) == "raylet"
    assert memory.role(["/bin/python", "-u", "/lib/ray/dashboard/agent.py"]) == memory.role([]) == "Ray's helpers"


def test_early_is_the_second_fifth_and_late_the_last():
    weights = [Weight(rss, rss / 2) for rss in [900, 900, 10, 20, 500, 500, 500, 500, 30, 50]]
    assert memory.early_and_late(weights) == ((15, 7.5), (40, 20))


@pytest.mark.ray
@pytest.mark.slow
def test_rates_and_memory_of_whole_runs(tmp_path):
    options = ["--cache", str(tmp_path), "--image_size", "192", "--batch_size", "2", "--threads", "1", "--loaders", "1"]
    short = ["--steps", "4", "--skipped", "2"]
    figures = bench([*options, *short, "--repeats", "1"])
    assert [f["figure"].split("/")[-1] for f in figures] == [
        MODELS[n].name.split("/")[-1] for n in train.Config().models
    ]
    for figure in figures:
        assert figure["value"] > 0 and figure["ratio"] == pytest.approx(figure["value"] / figure["peer_value"])
    weighed = {f["figure"]: f for f in bench([*options, *short, "--memory_epochs", "10"])}
    for role in ("train worker", "driver", "loaders"):
        figure = weighed[f"memory of {role} over 10 epochs"]
        assert figure["value"] > 50 and figure["peer_value"] > 50


def bench(options: list[str]) -> list[dict]:
    command = [sys.executable, str(ROOT / "jobs" / "bench.py"), "train", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | {"HOME": os.environ["HOME"]})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
