"""What every family promises: losses, predictions, normalisation, save and load."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model

from ray_det.models.build import build_detector
from ray_det.models.detector import Batch, Prediction, to_device
from ray_det.types import IMAGENET_MEAN, MicroBatch, UserError
from tests.models.zoo import CLASSES, CNNS, CPU, DETRS, FAMILIES, SIZES, batch, build, gradients, spread_scores

families = pytest.mark.parametrize("family", FAMILIES)


@families
@pytest.mark.parametrize("training", [True, False])
def test_the_named_losses_add_up_to_the_loss(family, training):
    detector = build(family).train(training)
    losses = detector(batch())
    assert tuple(losses) == ("loss", *detector.loss_names)
    assert losses["loss"].dtype == torch.float32 and losses["loss"].requires_grad
    parts = torch.stack([losses[name] for name in detector.loss_names])
    assert not parts.requires_grad and (parts > 0).sum() >= 2
    assert parts.sum().item() == pytest.approx(losses["loss"].item(), rel=1e-5)


def test_targets_are_each_images_own():
    images = [
        dict(boxes=[[0, 0, 2, 3]], labels=[1], image_id=7, area=[6], iscrowd=[0], orig_size=[16, 12], size=[8, 6]),
        dict(boxes=[], labels=[], image_id=2, area=[], iscrowd=[], orig_size=[40, 60], size=[4, 6]),
        dict(boxes=[[1, 1, 5, 2], [0, 2, 4, 4]], labels=[2, 0], image_id=2**40)
        | dict(area=[4, 8], iscrowd=[0, 0], orig_size=[80, 50], size=[8, 5]),
    ]
    micro = MicroBatch(
        *(0, 0, 0, np.zeros((3, 8, 6, 3), np.uint8)),
        np.array([image["size"] for image in images], np.int32),
        np.array([image["orig_size"] for image in images], np.int32),
        np.array([image["image_id"] for image in images]),
        [np.array(image["boxes"], np.float32).reshape(-1, 4) for image in images],
        [np.array(image["labels"], np.int64) for image in images],
    )
    got: Any = to_device(micro, CPU).targets
    assert [{key: value.tolist() for key, value in target.items()} for target in got] == images


@families
@pytest.mark.parametrize("boxes", [True, False])
def test_every_trainable_parameter_gets_a_gradient(family, boxes):
    detector = build(family).train()
    losses = detector(batch(boxes=boxes))
    losses["loss"].backward()
    assert torch.isfinite(gradients(detector)).all()


@families
def test_a_step_is_a_function_of_the_seed(family):
    totals = []
    for _ in range(2):
        detector = build(family).train()
        torch.manual_seed(7)
        totals.append(detector(batch())["loss"].item())
    assert totals[0] == totals[1]


@families
def test_the_validation_loss_is_a_function_of_the_batch(family):
    detector = build(family).eval()
    with torch.inference_mode():
        torch.manual_seed(1)
        first = detector.loss(batch())["loss"]
        torch.manual_seed(2)
        state = torch.get_rng_state()
        both, predictions = detector.loss_and_predict(batch())
        alone = detector.predict(batch())
    assert first == both["loss"]
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(predictions, alone, strict=True):
        assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["scores"], b["scores"])


def test_too_few_values_for_batch_norm_are_told():
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    size, boxes, labels = np.array([[32, 32]], np.int32), np.array([[2, 2, 20, 20]], np.float32), np.array([1])
    alone = to_device(MicroBatch(0, 0, 0, pixels, size, size, np.arange(1), [boxes], [labels]), CPU)
    detector = build("fcos").train()
    with pytest.raises(UserError, match=r"^BatchNorm .* 96 channels, .* 1 image of 32 x 32 pixels") as raised:
        detector(alone)
    assert "\n" not in str(raised.value)
    assert torch.isfinite(detector.eval()(alone)["loss"])


@pytest.mark.parametrize("bf16", [False, True])
def test_fcos_with_a_channel_per_group_takes_one_image_whose_top_level_is_a_cell(bf16):
    torch.manual_seed(0)
    detector, _ = build_detector(FAMILIES["fcos"].model_copy(update={"fpn_channels": 32}), CLASSES)
    alone = batch(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        detector.train()(alone)["loss"].backward()
        assert torch.isfinite(gradients(detector)).all()
        with torch.inference_mode():
            losses, (found,) = spread_scores(detector).loss_and_predict(alone)
    assert torch.isfinite(losses["loss"]) and len(found["scores"])


@families
def test_training_goes_on_after_inference(family):
    """Tensors cached under `inference_mode` must not end up in a training graph."""
    detector = build(family).eval()
    with torch.inference_mode():
        detector.predict(batch())
    detector.train()(batch())["loss"].backward()


@families
def test_predictions_are_sorted_and_inside_the_real_pixels(family):
    detector = spread_scores(build(family))
    with torch.inference_mode():
        predictions = detector.predict(batch())
    assert len(predictions) == 3 and sum(len(p["scores"]) for p in predictions)
    for prediction, (height, width) in zip(predictions, SIZES, strict=False):
        assert set(prediction) == {"boxes", "scores", "labels"}
        boxes, scores, labels = prediction["boxes"], prediction["scores"], prediction["labels"]
        assert (boxes.dtype, scores.dtype, labels.dtype) == (torch.float32, torch.float32, torch.int64)
        assert boxes.shape == (len(scores), 4) and len(labels) == len(scores) <= 100
        assert (scores.diff() <= 0).all() and (scores >= 0).all() and (scores <= 1).all()
        assert set(labels.tolist()) <= {0, 1, 2}
        assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= width).all() and (boxes[:, [1, 3]] <= height).all()


def has_partner(these: Prediction, those: Prediction) -> torch.Tensor:
    """bool (N,): which of these are among those too, to 1e-4. Ranks are not compared: scores may be equal to 1e-7."""
    boxes = (these["boxes"][:, None] - those["boxes"]).abs().amax(-1)
    scores = (these["scores"][:, None] - those["scores"]).abs()
    return ((torch.maximum(boxes, scores) < 1e-4) & (these["labels"][:, None] == those["labels"])).any(1)


@families
def test_batch_mates_do_not_matter(family):
    detector = spread_scores(build(family))
    together = batch()
    with torch.inference_mode():
        for i, expected in enumerate(detector.predict(together)):
            alone = Batch(
                together.images_B3HW[i : i + 1],
                together.pixel_mask_BHW[i : i + 1],
                together.sizes[i : i + 1],
                together.targets[i : i + 1],
            )
            found = detector.predict(alone)[0]
            assert len(found["scores"]) == len(expected["scores"])
            assert torch.allclose(found["scores"], expected["scores"], atol=1e-4)
            assert has_partner(expected, found)[:20].all()


@families
@pytest.mark.parametrize("padding", ["mean", "zero"])
def test_a_padded_pixel_is_the_mean_under_the_models_normalisation(family, padding):
    detector = build(family, padding=padding)
    pictures = batch()
    white = dataclasses.replace(pictures, images_B3HW=torch.full_like(pictures.images_B3HW, 255))
    images = detector.normalise(white)
    std, mean = detector.get_buffer("_std"), detector.get_buffer("_mean")
    restored = (images * std + mean).permute(0, 2, 3, 1)
    expected = torch.tensor(IMAGENET_MEAN if padding == "mean" else (0.0, 0.0, 0.0))
    assert (restored[~pictures.pixel_mask_BHW] - expected).abs().max() < 1e-6
    assert (restored[pictures.pixel_mask_BHW] - 1).abs().max() < 1e-6


def test_only_imagenet_normalised_models_see_zeros_in_the_padding():
    pictures = batch()
    for family in FAMILIES:
        padded = build(family).normalise(pictures)[1][:, -1, -1]
        assert (padded.abs().max() < 1e-6) == (family not in ("d_fine", "rt_detr_v2")), family


@families
def test_a_saved_detector_predicts_bit_for_bit_the_same(family, tmp_path):
    detector = spread_scores(build(family))
    save_model(detector, str(tmp_path / "model.safetensors"))
    architecture = json.loads(json.dumps(detector.architecture))
    again, report = build_detector(FAMILIES["fcos"], CLASSES, architecture=architecture)
    load_model(again, str(tmp_path / "model.safetensors"))
    assert report is None
    with torch.inference_mode():
        for a, b in zip(detector.predict(batch()), again.eval().predict(batch()), strict=True):
            assert all(torch.equal(a[k], b[k]) for k in ("boxes", "scores", "labels"))
    assert again.loss_names == detector.loss_names and again.size_divisor == detector.size_divisor == 32


@pytest.mark.parametrize("family", DETRS)
def test_the_criterion_of_transformers_leaves_autocast(family, monkeypatch):
    detector: Any = build(family).train()
    criterion, seen = detector.net.loss_function.criterion, []

    def spy(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        seen.extend(a.dtype == torch.bfloat16 for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        return criterion(*args, **kwargs)

    monkeypatch.setattr(detector.net.loss_function, "criterion", spy)
    with torch.autocast("cpu", torch.bfloat16):
        detector(batch())["loss"].backward()
    assert len(seen) > 2 and not any(seen)


@families
def test_under_bfloat16_losses_and_boxes_stay_float32(family):
    detector = build(family).eval()
    with torch.inference_mode():
        exact = detector.loss(batch())
        with torch.autocast("cpu", torch.bfloat16):
            losses, predictions = detector.loss_and_predict(batch())
    assert all(value.dtype == torch.float32 for value in losses.values())
    if family != "rt_detr_v2":  # fresh, it picks other queries among nearly equal ones
        assert losses["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.05)
    for prediction in predictions:
        assert prediction["boxes"].dtype == prediction["scores"].dtype == torch.float32


@pytest.mark.parametrize("family", CNNS)
def test_anchors_are_not_rounded_to_bfloat16(family):
    detector: Any = build(family).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        outputs = detector.propose(batch()) if family == "fasterrcnn" else detector.outputs(batch())
    assert all(anchors.dtype == torch.float32 for anchors in outputs.anchors)


@pytest.mark.parametrize("family", DETRS)
def test_boxes_of_transformers_are_not_rounded_to_bfloat16(family):
    detector = spread_scores(build(family))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        boxes = detector.predict(batch())[0]["boxes"] / 128
    assert (boxes != boxes.bfloat16().float()).float().mean() > 0.5
