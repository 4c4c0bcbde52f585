"""`jobs/export.py` as a user runs it: files that other programs read, and that answer as the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

import ray_det
from ray_det.data.prepare import make
from ray_det.export.parity import OnnxDetector, Parity
from ray_det.models.build import build_detector
from ray_det.models.detector import to_device
from ray_det.train.checkpoint import Checkpoint
from ray_det.types import Detections
from tests.evaluate.test_roundtrip import evaluation_batches
from tests.jobs.run import run_job
from tests.models.zoo import CPU, FAMILIES, batch, spread_scores
from tests.predict.conftest import CLASSES, save_checkpoint, write_checkpoint


def export(model: Path, output: Path, *more: object) -> int:
    return run_job("export", "--checkpoint", model, "--output", output, *more)


@pytest.fixture(scope="module")
def detr(tmp_path_factory) -> Path:
    """Trained in bfloat16, as on a GPU; files compute in float32."""
    return write_checkpoint(tmp_path_factory.mktemp("detr") / "model", "detr", precision="bf16")


@pytest.fixture(scope="module")
def exported(detr, small_coco, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "out"
    assert export(detr, output, "--data.val", small_coco["val"]) == 0
    return output


def test_the_file_says_what_it_takes(exported):
    model = onnx.load(exported / "model.onnx")
    about = {one.key: one.value for one in model.metadata_props}
    assert json.loads(about["classes"]) == CLASSES.to_json()
    assert "uint8" in about["input images"] and "multiples of 32" in about["input images"]
    assert "longest side at 96 pixels" in about["preparation"]
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"))
    assert [(one.name, one.type, one.shape) for one in session.get_inputs()] == [
        ("images", "tensor(uint8)", ["batch", 3, "height", "width"]),
        ("sizes", "tensor(int64)", ["batch", 2]),
    ]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [
        ("boxes", ["batch", 20, 4]),
        ("scores", ["batch", 20]),
        ("labels", ["batch", 20]),
    ]


def test_it_answers_as_the_checkpoint_on_other_batches_and_canvases(exported, detr, small_coco):
    report = json.loads((exported / "parity.json").read_text())
    assert report["passed"] and report["images"] == 7 and report["detections"] > 7
    assert report["ap_onnx"] == pytest.approx(report["ap_checkpoint"], abs=1e-3)
    detector = ray_det.load(str(detr), device="cpu", precision="fp32")
    session = OnnxDetector(exported / "model.onnx", 1)
    batches = [detector.prepare(path, i) for i, path in enumerate((small_coco["val"].parent / "images").glob("v*.jpg"))]
    assert len({b.pixels_BHW3.shape for b in batches}) > 2
    for one in batches:
        ((wanted,), (found,)) = next(iter(detector.detect([one]))), session.detect(one)
        assert np.allclose(found.scores_N, wanted.scores_N, atol=1e-4)
        assert np.allclose(found.boxes_N4, wanted.boxes_N4, atol=1e-2)
        assert (found.labels_N == wanted.labels_N).all()
    several = type(batches[0]).joined([batches[0]] * 3)
    assert all(np.allclose(f.scores_N, session.detect(batches[0])[0].scores_N) for f in session.detect(several))


def test_transformers_loads_the_folder(exported, detr):
    network = AutoModelForObjectDetection.from_pretrained(exported / "pretrained")
    assert network.config.id2label == dict(enumerate(CLASSES.names))
    detector = Checkpoint.open(detr).build(torch.device("cpu"))
    images = batch(2)
    with torch.no_grad():
        found = network.eval()(detector.normalise(images), pixel_mask=images.pixel_mask_BHW.long())
        boxes, logits = found.pred_boxes, found.logits
        wanted = detector.outputs(images, None)  # pyright: ignore[reportCallIssue]
    assert torch.allclose(logits, wanted.logits, atol=1e-5) and torch.allclose(boxes, wanted.pred_boxes, atol=1e-5)


def test_the_card_names_classes_parity_and_command(exported, detr):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\npipeline_tag: object-detection\n") and "library_name: transformers" in card
    assert "| 1 | 3 | box |" in card and "AP of the checkpoint" in card
    sums = Checkpoint.open(detr).content["sha256"]
    assert sums["model.safetensors"] in card and f"--checkpoint {detr}" in card


def test_an_export_that_compares_nothing_leaves_no_older_comparison(exported, detr, tmp_path):
    shutil.copytree(exported, output := tmp_path / "out")
    assert "`parity.json`" in (output / "README.md").read_text()
    assert export(detr, output) == 0
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "model.onnx", "pretrained"]
    card = (output / "README.md").read_text()
    assert "Not compared" in card and "parity.json" not in card


def test_what_cannot_be_exported_is_one_line(detr, tmp_path, capfd):
    for canvas, message in (("100,96", "multiples of 32"), ("96", "expected height,width"), ("0,0", "canvas")):
        assert export(detr, tmp_path / "out", "--canvas", canvas) == 2
        error = capfd.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_without_the_packages_it_says_which(detr, tmp_path, capfd, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export(detr, tmp_path / "out") == 2
    assert "pip install 'ray-det[onnx]'" in capfd.readouterr().err


def detections(*rows: tuple[float, float, int]) -> Detections:
    """(x0, score, label) of boxes of 10 x 10."""
    boxes = np.array([[x, 0, x + 10, 10] for x, _, _ in rows], np.float32).reshape(-1, 4)
    return Detections(1, boxes, np.array([s for _, s, _ in rows]), np.array([n for _, _, n in rows], np.int64))


@pytest.mark.parametrize(
    ("other", "agreeing"),
    [
        (((20.1, 0.5, 0), (0, 0.9, 1)), 4),
        (((20.6, 0.5, 0), (0, 0.9, 1)), 2),
        (((20, 0.502, 0), (0, 0.9, 1)), 2),
        (((20, 0.5, 1), (0, 0.9, 1)), 2),
        (((20, 0.5, 0), (0, 0.9, 1), (40, 0.04, 1)), 4),
    ],
)
def test_parity_counts_partners_within_bounds(other, agreeing):
    parity = Parity()
    parity.add(detections((0, 0.9, 1), (20, 0.5, 0)), detections(*other))
    assert (parity.detections, parity.agreeing) == (4, agreeing)
    assert bool(parity.failures) == (agreeing < 4)
    assert parity.worst_box_px <= 0.5 and parity.worst_score <= 1e-3


def test_an_ap_that_differs_fails():
    assert not Parity(1, 2, 2, ap_checkpoint=0.5, ap_onnx=0.5009).failures
    assert "AP 0.5020 in place of 0.5000" in Parity(1, 2, 2, ap_checkpoint=0.5, ap_onnx=0.502).failures[0]


@pytest.mark.slow
@pytest.mark.parametrize("canvas", [None, "96,96"])
@pytest.mark.parametrize("family", ["fcos", "retinanet", "fasterrcnn"])
def test_other_families(family, canvas, small_coco, tmp_path):
    torch.manual_seed(0)
    detector = build_detector(FAMILIES[family], CLASSES)[0].train()
    with torch.no_grad():
        for seed in range(20):  # norms without statistics leave hardly anything of an image: all scores are equal
            detector.loss(batch(4, seed))
    model = save_checkpoint(spread_scores(detector), family, tmp_path / "model")
    more = ("--canvas", canvas) if canvas else ()
    assert export(model, tmp_path / "out", "--data.val", small_coco["val"], *more) == 0
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["passed"] and report["images"] == 7 and report["detections"] > 100
    weights = load_file(tmp_path / "out" / "pretrained" / "model.safetensors")
    assert set(weights) <= set(Checkpoint.open(model).build(torch.device("cpu")).get_submodule("net").state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["d_fine", "rt_detr_v2"])
def test_detection_transformers_after_a_short_training(family, small_coco, tmp_path):
    """With random weights all queries are alike, and which of them are taken is chance."""
    manifest, _ = make(str(small_coco["train"]), None)
    torch.manual_seed(0)
    detector = build_detector(FAMILIES[family], CLASSES)[0].train()
    batches = [to_device(one, CPU) for one in evaluation_batches(manifest, 32, "longest")]
    optimizer = torch.optim.AdamW(detector.parameters(), 1e-3)
    for step in range(120):
        loss = detector.loss(batches[step % len(batches)])["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
    model = save_checkpoint(detector.eval(), family, tmp_path / "model", image_size=256)
    assert export(model, tmp_path / "out", "--data.val", small_coco["train"]) == 0
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["passed"] and report["detections"] > 30 and report["ap_checkpoint"] > 0.01, report
    network = AutoModelForObjectDetection.from_pretrained(tmp_path / "out" / "pretrained")
    with torch.no_grad():
        ours, theirs = detector.outputs(batches[0], None), network.eval()(detector.normalise(batches[0]))  # pyright: ignore
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-3)
