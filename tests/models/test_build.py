"""Names and arguments: what exists is built, what does not is an error that names the nearest."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torchvision import models
from torchvision.models.detection.anchor_utils import AnchorGenerator

from ray_det.config import ModelConfig
from ray_det.models.build import build_detector
from ray_det.models.torchvision_backbones import build_trunk
from ray_det.models.torchvision_build import BUILDERS, OWN_ANCHORS
from ray_det.types import ClassList, UserError
from tests.models.zoo import CLASSES, CPU, DETR, FAMILIES, HGNET, RT_DETR, batch, gradients

SIZES = [8, 16, 32, 64, 128]


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("resnet18", [64, 128, 256, 512]),
        ("mobilenet_v2", [24, 32, 96, 1280]),
        ("mobilenet_v3_small", [16, 24, 48, 576]),
        ("mobilenet_v3_large", [24, 40, 112, 960]),
        ("efficientnet_b0", [24, 40, 112, 1280]),
        ("convnext_tiny", [96, 192, 384, 768]),
        ("regnet_y_400mf", [48, 104, 208, 440]),
        ("densenet121", [256, 512, 1024, 1024]),
        ("swin_t", [96, 192, 384, 768]),
    ],
)
def test_strides_and_channels_of_backbones(backbone, channels):
    trunk = build_trunk(backbone, (4, 8, 16, 32)).eval()
    with torch.inference_mode():
        maps = trunk(torch.zeros(1, 3, 64, 96))
    assert trunk.channels == channels
    assert [tuple(m.shape[1:]) for m in maps.values()] == [
        (c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "swin_t"])
def test_nothing_of_the_trunk_is_unused(backbone):
    trunk = build_trunk(backbone, (8, 16, 32)).train()
    maps = trunk(torch.rand(2, 3, 64, 96))
    torch.stack([m.sum() for m in maps.values()]).sum().backward()
    gradients(trunk)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_torchvisions_own_detectors(name):
    detector, _ = build_detector(ModelConfig(name=f"torchvision/{name}", weights="none"), CLASSES)
    detector.train()(batch())["loss"].backward()
    gradients(detector)
    with torch.inference_mode():
        assert len(detector.eval().predict(batch())) == 3


def test_a_builders_name_with_other_channels_is_built_from_its_parts():
    config = ModelConfig(name="torchvision/fcos_resnet50_fpn", weights="none", fpn_channels=64)
    detector: Any = build_detector(config, CLASSES)[0]
    assert detector.net.backbone.out_channels == 64


def test_arguments_reach_torchvisions_detector():
    def network(family: str, **config: Any) -> Any:
        return build_detector(FAMILIES[family].model_copy(update={"config": config}), CLASSES)[0].net

    assert (network("fcos").score_thresh, network("fcos").detections_per_img) == (0.05, 100)
    assert network("fcos", score_thresh=0.3).score_thresh == 0.3
    assert network("fasterrcnn", detections_per_img=7).roi_heads.detections_per_img == 7
    assert network("fcos", anchor_sizes=[4, 8, 16, 32, 64]).anchor_generator.sizes[0] == (4,)


def anchors_of(detector: Any) -> Any:
    return next(module for module in detector.modules() if isinstance(module, AnchorGenerator))


@pytest.mark.parametrize("family", ["retinanet", "fasterrcnn"])
def test_anchors_are_those_asked_for(family):
    config = {"anchor_sizes": SIZES, "aspect_ratios": [1.0, 2.0]}
    detector: Any = build_detector(FAMILIES[family].model_copy(update={"config": config}), CLASSES)[0]
    anchors = anchors_of(detector)
    assert anchors.sizes == ((8,), (16,), (32,), (64,), (128,)) and anchors.aspect_ratios == ((1.0, 2.0),) * 5
    head = detector.net.head.regression_head.bbox_reg if family == "retinanet" else detector.net.rpn.head.bbox_pred
    assert head.out_channels == 2 * 4
    again = build_detector(FAMILIES["fcos"], CLASSES, architecture=json.loads(json.dumps(detector.architecture)))[0]
    assert anchors_of(again).sizes == anchors.sizes and anchors_of(again).aspect_ratios == anchors.aspect_ratios


@pytest.mark.parametrize("sizes", [SIZES, [8, 16], 8])
def test_faster_rcnn_of_an_older_checkpoint_keeps_the_default_anchors_it_was_trained_with(sizes):
    """Its `anchors` mark is absent: what the configuration said of them, right or wrong, had no effect."""
    detector: Any = build_detector(FAMILIES["fasterrcnn"].model_copy(update={"config": {}}), CLASSES)[0]
    older = {key: value for key, value in detector.architecture.items() if key != "anchors"}
    older["config"] = {"anchor_sizes": sizes, "aspect_ratios": [1.0, 2.0], "detections_per_img": 7}
    again: Any = build_detector(FAMILIES["fcos"], CLASSES, architecture=older)[0]
    assert anchors_of(again).sizes == ((32,), (64,), (128,), (256,), (512,))
    assert again.net.roi_heads.detections_per_img == 7 and again.architecture == older
    again.load_state_dict(detector.state_dict())


def test_mobilenets_own_faster_rcnn_takes_other_channels():
    config = ModelConfig(name="torchvision/fasterrcnn_mobilenet_v3_large_fpn", weights="none", fpn_channels=32)
    detector: Any = build_detector(config, CLASSES)[0]
    assert detector.net.rpn.head.bbox_pred.in_channels == 32 and len(anchors_of(detector).sizes) == 5
    config = config.model_copy(update={"config": {"anchor_sizes": SIZES}})
    assert anchors_of(build_detector(config, CLASSES)[0]).sizes[0] == (8,)


@pytest.mark.parametrize("option", [{"anchor_sizes": SIZES}, {"aspect_ratios": [1.0]}])
@pytest.mark.parametrize("name", OWN_ANCHORS)
def test_builders_that_make_their_own_anchors_take_none(name, option):
    with pytest.raises(UserError, match=f"torchvision/{name} has anchors of its own, it takes no anchor_sizes or"):
        build_detector(ModelConfig(name=f"torchvision/{name}", weights="none", config=option), CLASSES)


@pytest.mark.parametrize("name", BUILDERS)
def test_which_builders_take_anchors_is_what_torchvision_says(name):
    key = "rpn_anchor_generator" if name.startswith("fasterrcnn") else "anchor_generator"
    generator = AnchorGenerator(tuple((size,) for size in SIZES), ((1.0,),) * len(SIZES))
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, key: generator}
    if name in OWN_ANCHORS:
        with pytest.raises(TypeError, match=f"multiple values for keyword argument '{key}'"):
            models.get_model(name, **options)
    else:
        assert anchors_of(models.get_model(name, **options)) is generator


@pytest.mark.parametrize("kind", ["rt_detr", "deformable_detr", "conditional_detr", "deimv2", "table-transformer"])
def test_other_detection_transformers(kind):
    config: dict[str, Any] = DETR
    if kind == "rt_detr":
        config = FAMILIES["rt_detr_v2"].config
    elif kind == "deimv2":
        config = RT_DETR | {"backbone_config": HGNET, "encoder_in_channels": [48, 64, 96], "depth_mult": 0.34}
    elif kind == "deformable_detr":
        config = DETR | {"num_feature_levels": 3}
    torch.manual_seed(0)
    detector, _ = build_detector(ModelConfig(name=f"transformers/{kind}", weights="none", config=config), CLASSES)
    for boxes in (True, False):
        detector.train().zero_grad()
        losses = detector(batch(boxes=boxes))
        losses["loss"].backward()
        gradients(detector)
        assert sum(losses[n].item() for n in detector.loss_names) == pytest.approx(losses["loss"].item(), rel=1e-5)


def test_defaults_of_a_model_type():
    detector: Any = build_detector(FAMILIES["detr"], CLASSES)[0]
    config = detector.net.config
    assert config.backbone_config.model_type == "resnet" and config.auxiliary_loss
    assert config.id2label == {0: "red", 1: "green", 2: "blue"}
    fixed = FAMILIES["d_fine"].config | {"eval_size": 640, "anchor_image_size": [640, 640]}
    detector = build_detector(FAMILIES["d_fine"].model_copy(update={"config": fixed}), CLASSES)[0]
    assert detector.net.config.eval_size is None and detector.net.config.anchor_image_size is None


def test_classes_of_one_name_are_two_labels_of_transformers():
    twins = ClassList(("red", "green", "red"), (1, 5, 9))
    config = cast(Any, build_detector(FAMILIES["detr"], twins)[0]).net.config
    assert config.id2label == {0: "red (id 1)", 1: "green", 2: "red (id 9)"}
    assert config.label2id == {name: label for label, name in config.id2label.items()}


def test_boxes_are_counted_in_the_micro_batch_alone(monkeypatch):
    """An initialised `accelerate` in the process must not average them over its ranks."""
    from ray_det.models import transformers_adapter

    class PartialState:
        _shared_state = {"num_processes": 2}

    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(PartialState=PartialState))
    with transformers_adapter.one_process():
        assert PartialState._shared_state == {}
    assert PartialState._shared_state == {"num_processes": 2}


def test_a_canvas_with_too_few_cells_for_the_queries_is_enlarged():
    """The same loss and boxes as on a canvas that was large enough from the beginning."""
    config = FAMILIES["d_fine"].config | {"num_queries": 300}  # 96 x 128 pixels have 252 cells
    detector, _ = build_detector(FAMILIES["d_fine"].model_copy(update={"config": config}), CLASSES)
    detector.to(CPU).train()
    small, more = batch(), (0, 0, 0, 32)
    images, mask = F.pad(small.images_B3HW, more), F.pad(small.pixel_mask_BHW, more)
    large, losses = replace(small, images_B3HW=images, pixel_mask_BHW=mask), []
    for one in (small, large):
        torch.manual_seed(0)
        losses.append(detector(one)["loss"])
    assert torch.equal(*losses)
    detector.eval()
    for a, b in zip(*(detector.predict(one) for one in (small, large)), strict=True):
        assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["scores"], b["scores"])


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("fcos_resnet18_fpn", {}, "unknown model 'fcos_resnet18_fpn': torchvision/"),
        ("torchvision/fcs_resnet18_fpn", {}, "did you mean fcos_resnet18_fpn"),
        ("torchvision/fcos_resnet19_fpn", {}, "no backbone 'resnet19'; did you mean resnet18"),
        ("torchvision/fcos_vit_b_16_fpn", {}, "'vit_b_16' has no feature pyramid: no feature map at stride"),
        ("torchvision/fcos_resnet18_fpn", {"score_tresh": 0.1}, "no argument 'score_tresh'; nearest: score_thresh"),
        ("torchvision/fcos_resnet18_fpn", {"anchor_sizes": [8, 16]}, "for 2 levels, .* has 5"),
        ("torchvision/retinanet_resnet18_fpn", {"anchor_sizes": [[8, 9], 1, 2, 3, 4]}, "equally many anchors"),
        ("torchvision/fasterrcnn_resnet18_fpn", {"anchor_sizes": [8, 16]}, "for 2 levels, .* has 5"),
        ("torchvision/fasterrcnn_resnet18_fpn", {"anchor_sizes": [[8, 9], 1, 2, 3, 4]}, "equally many anchors"),
        ("torchvision/fasterrcnn_resnet18_fpn", {"aspect_ratios": [1.0]}, "aspect_ratios need anchor_sizes"),
        ("torchvision/fasterrcnn_resnet18_fpn", {"box_anchor_sizes": SIZES}, "no argument 'box_anchor_sizes'"),
        ("torchvision/retinanet_resnet50_fpn", {"anchor_sizes": SIZES, "aspect_ratios": 1.0}, "aspect_ratios 1.0: exp"),
        ("torchvision/retinanet_resnet50_fpn", {"anchor_sizes": 8}, "anchor_sizes 8: expected a list of positive num"),
        ("torchvision/retinanet_resnet50_fpn", {"anchor_sizes": ["8", 1, 2, 3, 4]}, "expected a list of positive num"),
        ("torchvision/retinanet_resnet50_fpn", {"anchor_sizes": [0, 1, 2, 3, 4]}, "expected a list of positive num"),
        ("transformers/d_fin", {}, "no such folder or model type; did you mean d_fine"),
        ("transformers//no/such/folder", {}, "no such folder"),
        ("transformers/d_fine", {"num_querys": 3}, "no field 'num_querys'; nearest: num_queries"),
        ("transformers/d_fine", {"backbone_config": {"depth": [1]}}, "backbone_config: no field 'depth'; nearest: d"),
        ("transformers/d_fine", {"num_labels": 3}, "num_labels follows from the data set"),
        ("transformers/d_fine", {"d_model": 100}, "100 must be divisible"),
        ("transformers/detr", {"backbone_config": {"model_type": "resnt"}}, "no model type 'resnt'; nearest: resnet"),
    ],
)
def test_wrong_names_and_fields_are_one_line(name, config, message):
    with pytest.raises(UserError, match=message) as raised:
        build_detector(ModelConfig(name=name, weights="none", config=config), CLASSES)
    assert "\n" not in str(raised.value)


def test_fpn_channels_that_norms_cannot_divide():
    with pytest.raises(UserError, match="fpn_channels 40: the norms of FCOS need a multiple of 32"):
        build_detector(FAMILIES["fcos"].model_copy(update={"fpn_channels": 40}), CLASSES)


def test_a_model_type_has_no_default_weights():
    with pytest.raises(UserError, match="--model.weights none"):
        build_detector(ModelConfig(name="transformers/detr", weights="default", config=DETR), CLASSES)


def test_default_weights_out_of_reach_are_one_line(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match="resnet18.*no route to host; --model.weights none") as raised:
        build_detector(ModelConfig(name="torchvision/fcos_resnet18_fpn"), CLASSES)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("reached", ["config", "weights"])
def test_a_hub_out_of_reach_is_one_line(monkeypatch, reached):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection")

    from ray_det.models import transformers_build

    detector: Any = build_detector(FAMILIES["detr"], CLASSES)[0]
    if reached == "config":
        monkeypatch.setattr(transformers_build.AutoConfig, "from_pretrained", refuse)
    else:
        monkeypatch.setattr(transformers_build.AutoConfig, "from_pretrained", lambda *_: detector.net.config)
        monkeypatch.setattr(transformers_build.AutoModelForObjectDetection, "from_pretrained", refuse)
    with pytest.raises(UserError, match="of 'owner/detr'.*couldn't connect.*--model.weights none") as raised:
        build_detector(ModelConfig(name="transformers/owner/detr"), CLASSES)
    assert "\n" not in str(raised.value)
