"""The moving average of the weights: its formula, when it moves, and that it is what a run evaluates."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from ray_det.config import OptimConfig
from ray_det.predict.predictor import open_checkpoint
from ray_det.train.ema import Ema, decay_after
from ray_det.train.optim import build_optimizer
from ray_det.train.step import train_step
from tests.models.zoo import CPU, build, micro_batch
from tests.train.runner import records, run_alone
from tests.train.test_equivalence import AVERAGED, spec, with_optim

BIAS = "net.head.regression_head.bbox_reg.bias"


def test_the_decay_warms_up():
    assert decay_after(1, 0.9999, 2000) == pytest.approx(0.9999 * (1 - math.exp(-1 / 2000)))
    assert decay_after(2000, 0.9999, 2000) == pytest.approx(0.9999 * (1 - 1 / math.e))
    assert decay_after(10**6, 0.9999, 2000) == pytest.approx(0.9999)
    assert decay_after(1, 0.9, 0) == 0.9


def test_it_is_the_average_and_buffers_are_copies():
    detector = build("fcos").train()
    detector.get_submodule("net.backbone.body").requires_grad_(False)
    ema = Ema(detector, 0.9, 5, updates=2)
    expected = {name: p.detach().clone() for name, p in detector.named_parameters()}
    with torch.no_grad():
        for value in (*detector.parameters(), *detector.buffers()):
            value.add_(1)
    for update in (3, 4):
        decay = 0.9 * (1 - math.exp(-update / 5))
        for name, p in detector.named_parameters():
            if p.requires_grad:
                expected[name] = decay * expected[name] + (1 - decay) * p.detach()
        ema.update()
    for name, p in ema.detector.named_parameters():
        torch.testing.assert_close(p.data, expected[name], rtol=1e-6, atol=1e-6)
    pairs = list(zip(ema.detector.buffers(), detector.buffers(), strict=True))
    assert pairs and all(torch.equal(a, b) and a is not b for a, b in pairs)
    assert not any(p.requires_grad for p in ema.detector.parameters()) and not ema.detector.training


def test_a_step_that_is_not_finite_does_not_move_it():
    detector = build("fcos").train()
    optimizer, ema = build_optimizer(OptimConfig(lr=1e-2), detector), Ema(detector, 0.5, 0)
    before = {name: value.clone() for name, value in ema.detector.state_dict().items()}
    step = {"device": CPU, "clip_norm": 1.0, "seed": 0, "global_step": 0, "ema": ema}
    bias = detector.get_parameter(BIAS).detach()
    sound = bias.clone()
    bias.fill_(float("nan"))
    assert not train_step(detector, optimizer, [micro_batch()], **step).applied
    assert ema.updates == 0 and all(torch.equal(v, before[k]) for k, v in ema.detector.state_dict().items())
    bias.copy_(sound)
    assert train_step(detector, optimizer, [micro_batch()], **step).applied
    assert ema.updates == 1
    assert torch.equal(ema.detector.get_parameter(BIAS), torch.lerp(before[BIAS], bias, 0.5))


def test_it_is_what_is_evaluated_and_kept(small_coco, tmp_path):
    """With an average that hardly moves, validation sees the weights of the beginning; checkpoints hold both."""
    still = with_optim(spec(small_coco, tmp_path / "still", "fcos", epochs=2), AVERAGED | {"ema_decay": 0.9999999})
    still["config"]["optim"]["ema_warmup_steps"] = 0
    run = run_alone(still)
    losses = [r["val/loss"] for r in records(run) if "val/loss" in r]
    plain = run_alone(spec(small_coco, tmp_path / "plain", "fcos", epochs=2))
    trained = [r["val/loss"] for r in records(plain) if "val/loss" in r]
    assert abs(losses[1] - losses[0]) < abs(trained[1] - trained[0]) / 2
    steps = [r["train/batch_loss"] for r in records(run) if "train/batch_loss" in r]
    assert steps == [r["train/batch_loss"] for r in records(plain) if "train/batch_loss" in r]

    last, step = run / "kept" / "checkpoint_00000006_test", "train/batch_loss"
    average, best = load_file(last / "ema.safetensors"), load_file(run / "best" / "model.safetensors")
    assert not torch.equal(average[BIAS], load_file(last / "model.safetensors")[BIAS]), step
    assert not (run / "best" / "ema.safetensors").exists()
    found = json.loads((run / "best" / "state.json").read_text())["state"]["best_step"]
    if found == 6:
        assert all(torch.equal(best[name], average[name]) for name in average)
    for folder in (last, run):  # a checkpoint of the run, and its best
        loaded = open_checkpoint(str(folder)).build(CPU).state_dict()
        assert all(torch.equal(loaded[name], (average if folder is last else best)[name]) for name in average)
