"""Weight files: what fits is loaded, what does not is told, what is no weights is one clear line."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from ray_det.config import ModelConfig
from ray_det.models.build import build_detector
from ray_det.models.torchvision_backbones import FrozenBatchNorm
from ray_det.models.weights import WeightsReport, load_weights, read_weights
from ray_det.types import ClassList, UserError
from tests.models.zoo import BACKBONE, CLASSES, FAMILIES, batch, build

FIVE = ClassList(tuple("abcde"), (1, 2, 3, 4, 5))


def build_with(family: str, weights: object, classes: ClassList = FIVE) -> tuple[Any, WeightsReport]:
    torch.manual_seed(9)
    detector, report = build_detector(FAMILIES[family].model_copy(update={"weights": str(weights)}), classes)
    assert report is not None
    return detector, report


def frozen_norms(module: nn.Module) -> tuple[int, int]:
    """(frozen, all)."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    return sum(isinstance(m, FrozenBatchNorm) for m in norms), len(norms)


@pytest.mark.parametrize("family", ["fcos", "fasterrcnn", "d_fine", "detr"])
def test_another_number_of_classes_makes_the_head_anew(family, tmp_path):
    three: Any = build(family)
    torch.save({"model": three.net.state_dict()}, tmp_path / "three.pth")
    five, report = build_with(family, tmp_path / "three.pth")
    heads = ("cls_logits", "cls_score", "bbox_pred", "class", "score_head")
    assert report.remade and all(any(h in name for h in heads) for name in report.remade)
    assert not report.missing and not report.skipped
    old, new = three.net.state_dict(), five.net.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in report.loaded)
    assert "re-made" in report.table() and report.remade[0] in report.table()
    if family == "fcos":
        assert five.net.head.classification_head.cls_logits.bias.allclose(torch.tensor(-math.log(99.0)))
    if family == "d_fine":
        assert five.net.model.enc_score_head.bias.allclose(torch.tensor(-math.log(5.0)))
    five.train()(batch())["loss"].backward()


def test_norms_are_frozen_where_weights_were_loaded_and_nowhere_else(tmp_path):
    assert frozen_norms(build("fcos"))[0] == 0
    save_file(build("fcos").state_dict(), tmp_path / "run.safetensors")  # a run's own checkpoint: "net." in front
    detector, report = build_with("fcos", tmp_path / "run.safetensors", CLASSES)
    assert not report.missing and not report.remade and detector.architecture["frozen"] == "all"
    frozen, norms = frozen_norms(detector)
    assert frozen == norms > 10
    assert not any(
        p.requires_grad for m in detector.modules() if isinstance(m, FrozenBatchNorm) for p in m.parameters()
    )
    before = {k: v.clone() for k, v in detector.state_dict().items() if "running" in k}
    detector.train()(batch())["loss"].backward()
    assert all(torch.equal(v, detector.state_dict()[k]) for k, v in before.items())
    again, _ = build_detector(FAMILIES["fcos"], CLASSES, architecture=json.loads(json.dumps(detector.architecture)))
    assert frozen_norms(again) == (frozen, norms)


def test_a_classifiers_file_fits_the_backbone(tmp_path):
    torch.manual_seed(3)
    classifier: Any = torchvision.models.get_model(BACKBONE, weights=None)
    torch.save(classifier.state_dict(), tmp_path / "imagenet.pth")
    detector, report = build_with("retinanet", tmp_path / "imagenet.pth")
    assert frozen_norms(detector.net.backbone.body) == frozen_norms(classifier)[1:] * 2
    assert set(report.skipped) == {"fc.weight", "fc.bias"}
    assert all(not name.startswith("backbone.body") for name in report.missing)
    assert torch.equal(detector.net.backbone.body.conv1[0].weight, classifier.conv1[0].weight)


def test_a_classifiers_file_fits_torchvisions_own_mobilenet_detector(tmp_path):
    """There the body holds `features` without its name."""
    classifier = torchvision.models.mobilenet_v3_large(weights=None)
    torch.save({"state_dict": {f"module.{k}": v for k, v in classifier.state_dict().items()}}, tmp_path / "m.pth")
    config = ModelConfig(name="torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", weights=str(tmp_path / "m.pth"))
    detector, report = build_detector(config, CLASSES)
    assert report is not None and not any(name.startswith("backbone.body") for name in report.missing)
    assert all("classifier" in name for name in report.skipped)
    assert frozen_norms(detector) == (46, 46)


def test_norms_outside_the_loaded_body_stay_trainable(tmp_path):
    save_file(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "r.safetensors")
    name = "torchvision/fasterrcnn_resnet50_fpn_v2"
    detector: Any = build_detector(ModelConfig(name=name, weights=str(tmp_path / "r.safetensors")), CLASSES)[0]
    frozen, norms = frozen_norms(detector)
    assert frozen_norms(detector.net.backbone.body) == (frozen, frozen) and 50 < frozen < norms
    assert detector.net.roi_heads.box_predictor.cls_score.out_features == 1 + len(CLASSES)


def test_frozen_norm_is_torchvisions(tmp_path):
    norm, theirs = FrozenBatchNorm(8), torchvision.ops.FrozenBatchNorm2d(8)
    state = {k: torch.rand(8) for k in ("weight", "bias", "running_mean", "running_var")}
    norm.load_state_dict(state, strict=False)
    theirs.load_state_dict(state)
    x = torch.randn(2, 8, 5, 5)
    assert torch.allclose(norm.train()(x), theirs(x), atol=1e-5)


def test_a_folder_of_transformers(tmp_path):
    three: Any = build("d_fine")
    three.net.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "image_std": [0.5] * 3}))
    config = ModelConfig(name=f"transformers/{tmp_path}", config={"num_denoising": 10})
    five: Any
    five, report = build_detector(config, FIVE)
    assert report is not None and not report.missing
    assert all("class" in name or "score_head" in name for name in report.remade)
    assert five.net.config.num_denoising == 10 and five.net.config.num_labels == 5
    assert five.get_buffer("_std").flatten().tolist() == [0.5] * 3
    frozen, _ = frozen_norms(five.net.model.backbone)
    assert frozen > 0 and five.architecture["frozen"]
    backbone = five.net.model.backbone.state_dict()
    assert all(torch.equal(v, backbone[k]) for k, v in three.net.model.backbone.state_dict().items() if k in backbone)
    again, _ = build_detector(config, FIVE, architecture=json.loads(json.dumps(five.architecture)))
    again.load_state_dict(five.state_dict())
    five.train()(batch())["loss"].backward()


def test_fresh_weights_leave_nothing_of_the_backbone_frozen():
    for family in ("detr", "d_fine", "rt_detr_v2"):
        network = cast(Any, build(family)).net
        assert all(p.requires_grad for n, p in network.named_parameters() if "backbone" in n)
        assert frozen_norms(network)[0] == 0 and frozen_norms(network)[1] > 0
        assert all((m.weight == 1).all() for m in network.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        (b"not weights at all", "cannot be read: neither"),
        ({"classifier": nn.Linear(2, 2)}, "pickled objects"),
        ({"epoch": 3}, "no state dict"),
        ({"some.weight": torch.zeros(3, 5)}, "not one of its 1 tensors fits"),
    ],
)
@pytest.mark.parametrize("family", ["fcos", "detr"])
def test_what_is_no_weights_is_one_line(family, content, message, tmp_path):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(UserError, match=message) as raised:
        build_with(family, file)
    assert "\n" not in str(raised.value)


def test_a_cut_safetensors_file_is_one_line(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-50])
    with pytest.raises(UserError, match="cannot be read") as raised:
        read_weights(str(tmp_path / "x.safetensors"))
    assert "\n" not in str(raised.value)


def test_the_table_by_hand():
    network = nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 4)})
    state = {"x.body.weight": torch.ones(3, 2), "x.head.weight": torch.ones(9, 3), "x.other.bias": torch.ones(1)}
    report = load_weights(network, state, "file")
    assert report == WeightsReport(
        source="file",
        loaded=("body.weight",),
        skipped=("x.other.bias",),
        remade=("head.weight",),
        missing=("body.bias", "head.bias"),
    )
    assert (cast(nn.Linear, network["body"]).weight == 1).all()
    assert [line.split()[:2] for line in report.table().splitlines()[1:]] == [
        ["loaded", "1"],
        ["skipped", "1"],
        ["re-made", "1"],
        ["missing", "2"],
    ]
