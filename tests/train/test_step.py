"""One step: skipped whole where a number is not finite, clipped, the same in one piece or accumulated."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ray_det.config import OptimConfig
from ray_det.report.wandb_log import read_history
from ray_det.train.optim import build_optimizer, learning_rate
from ray_det.train.step import step_seed, train_step
from ray_det.types import TrainingError
from tests.models.zoo import CPU, build, micro_batch
from tests.train.runner import records, run_alone
from tests.train.test_equivalence import spec

STEP = {"device": CPU, "seed": 0, "global_step": 0}


def test_the_cosine_is_the_formula():
    config = OptimConfig()
    rates = [learning_rate(config, step, steps_per_epoch=10, epochs=4) for step in range(41)]
    expected = [1e-6 + 4.9e-5 * c for c in (1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0)]
    assert rates[::10] == pytest.approx(expected, abs=1e-12)
    assert all(rates[10 * e + i] == rates[10 * e] for e in range(4) for i in range(10))
    by_step = OptimConfig(interval="step", warmup_steps=5)
    assert learning_rate(by_step, 0, 10, 4) == pytest.approx(1e-5)
    assert learning_rate(by_step, 20, 10, 4) == pytest.approx(1e-6 + 4.9e-5 / 2)
    assert learning_rate(OptimConfig(schedule="constant"), 39, 10, 4) == 5e-5


def test_norms_and_biases_can_be_left_undecayed():
    detector = build("fcos")
    one, two = (build_optimizer(OptimConfig(decay_norms_and_biases=v), detector).param_groups for v in (True, False))
    assert [g["weight_decay"] for g in one] == [1e-4] and [g["weight_decay"] for g in two] == [1e-4, 0.0]
    assert all(p.ndim <= 1 for p in two[1]["params"]) and sum(len(g["params"]) for g in two) == len(one[0]["params"])


def test_a_step_that_is_not_finite_leaves_the_model_alone():
    detector = build("fcos").train()
    optimizer = build_optimizer(OptimConfig(), detector)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    broken = detector.get_parameter("net.head.regression_head.bbox_reg.bias")
    with torch.no_grad():
        broken.fill_(float("nan"))
    result = train_step(detector, optimizer, [micro_batch()], clip_norm=1.0, **STEP)
    assert not result.applied
    with torch.no_grad():
        broken.copy_(before["net.head.regression_head.bbox_reg.bias"])
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
    assert train_step(detector, optimizer, [micro_batch()], clip_norm=1.0, **STEP).applied
    assert any(not torch.equal(v, before[k]) for k, v in detector.state_dict().items() if "running_mean" in k)


def test_clipping_bounds_the_gradient_and_the_norm_is_of_before():
    norms = {}
    for clip in (0.0, 0.01):
        detector = build("fcos").train()
        optimizer = torch.optim.SGD(detector.parameters(), lr=1.0)
        before = [p.detach().clone() for p in detector.parameters() if p.requires_grad]
        result = train_step(detector, optimizer, [micro_batch()], clip_norm=clip, **STEP)
        after = [p for p in detector.parameters() if p.requires_grad]
        moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm().item()
        norms[clip] = result.grad_norm
        assert moved == pytest.approx(clip or result.grad_norm, rel=1e-2)
    assert norms[0.0] == norms[0.01] > 0.01


def test_the_gradient_is_the_mean_over_micro_batches():
    """Twice the same one is as good as one of it."""
    norms = []
    for batches in ([micro_batch()], [micro_batch(), micro_batch()]):
        optimizer = torch.optim.SGD((detector := build("fcos").train()).parameters(), lr=0.0)
        norms.append(train_step(detector, optimizer, batches, clip_norm=0.0, **STEP).grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_losses_are_means_over_micro_batches():
    batches = [micro_batch(2, seed=s) for s in range(2)]
    batches = [replace(b, index=i) for i, b in enumerate(batches)]
    optimizer = torch.optim.SGD((detector := build("detr").train()).parameters(), lr=0.0)
    alone = [train_step(detector, optimizer, [b], clip_norm=0.0, **STEP) for b in batches]
    both = train_step(detector, optimizer, batches, clip_norm=0.0, **STEP)
    assert both.loss == pytest.approx((alone[0].loss + alone[1].loss) / 2, rel=1e-5)
    assert sum(both.components.values()) == pytest.approx(both.loss, rel=1e-4)
    assert both.padded_share == pytest.approx((alone[0].padded_share + alone[1].padded_share) / 2)


def test_what_is_done_meanwhile_comes_after_the_gradients_and_before_its_numbers_are_read(monkeypatch):
    optimizer = torch.optim.SGD((detector := build("fcos").train()).parameters(), lr=1.0)
    weights, before, found = list(detector.parameters()), [p.detach().clone() for p in detector.parameters()], []

    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: found.append("read") or tolist(tensor))

    def meanwhile() -> None:
        found.append(all(w.grad is not None and torch.equal(w, b) for w, b in zip(weights, before, strict=True)))

    assert train_step(detector, optimizer, [micro_batch()], clip_norm=0.0, meanwhile=meanwhile, **STEP).applied
    assert found == [True, "read"]


def test_seeds_differ_by_seed_step_and_index():
    assert len({step_seed(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(small_coco, tmp_path):
    """An absurd learning rate: the run ends with a message that names the images, which are listed too."""
    asked = spec(small_coco, tmp_path, "fcos", epochs=9, lr=1e20)
    asked["config"]["optim"] |= {"clip_norm": 0, "warmup_steps": 0}
    asked["config"]["train"]["max_nonfinite_steps"] = 3
    asked["config"]["data"] |= {"val": None, "test": None}
    with pytest.raises(TrainingError, match="3 steps in a row") as caught:
        run_alone(asked)
    listed = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert len(listed) == 3 and len(listed[-1]["image_ids"]) == 6
    assert str(listed[-1]["image_ids"]) in str(caught.value)


def test_a_run_that_diverges_goes_back_to_a_sound_checkpoint_with_a_lower_rate(small_coco, tmp_path):
    """From step 3 on the rate is absurd: step 4 ruins the weights and is kept, in step 5 it shows, twice."""
    asked = spec(small_coco, tmp_path, "fcos", epochs=2)
    asked["config"]["optim"] |= {"clip_norm": 0, "warmup_steps": 0, "ema_decay": 0.5}
    first = run_alone(asked | {"config": asked["config"] | {"name": "first"}})
    sound = first / "kept" / "checkpoint_00000003_validate"
    asked["config"] |= {"wandb": {"mode": "offline"}}
    asked["config"]["optim"] |= {"lr": 1e25, "lr_min": 1e20}
    asked["config"]["train"] |= {"max_nonfinite_steps": 1, "max_rollbacks": 2, "rollback_lr_factor": 1e-14}
    (tmp_path / "run").mkdir()
    shutil.copy(first / "metrics.jsonl", tmp_path / "run")
    run = run_alone(asked | {"checkpoint": str(sound)})
    log = [r for r in records(run) if "train/batch_loss" in r]
    assert [r["global_step"] for r in log] == [1, 2, 3, 4, 5, 6]
    assert all(r["train/learning_rate"] < 1e-2 and math.isfinite(r["train/batch_loss"]) for r in log)
    skipped = (run / "nonfinite.jsonl").read_text().splitlines()
    assert [json.loads(line)["global_step"] for line in skipped] == [5, 5]
    last = run / "kept" / "checkpoint_00000006_test"
    average = load_file(last / "ema.safetensors")
    assert all(value.double().abs().max() < 1e6 for value in average.values())
    final = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    assert all(state["exp_avg"].abs().max() < 1e6 for state in final.values())
    in_wandb = {}  # where no step is taken twice: a run for each way
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        in_wandb[file.stem] = [row["train/learning_rate"] for row in read_history(file) if "train/batch_loss" in row]
    assert [name[len("run-01234567") :] for name in in_wandb] == ["", "-1", "-2"]
    assert list(in_wandb.values())[-1] == [r["train/learning_rate"] for r in log]


def test_no_checkpoint_is_kept_between_steps_that_are_not_finite(small_coco, tmp_path):
    """Step 4 ruins the weights, 5 and 6 show it: the only way back that is allowed leads to before them."""
    asked = spec(small_coco, tmp_path, "fcos", epochs=2)
    asked["config"]["optim"] |= {"clip_norm": 0, "warmup_steps": 0}
    first = run_alone(asked | {"config": asked["config"] | {"name": "first"}})
    asked["config"]["optim"] |= {"lr": 1e25, "lr_min": 1e20}
    asked["config"]["train"] |= {"max_nonfinite_steps": 2, "checkpoint_every_steps": 5}
    asked["config"]["train"] |= {"max_rollbacks": 1, "rollback_lr_factor": 1e-28}
    (tmp_path / "run").mkdir()
    shutil.copy(first / "metrics.jsonl", tmp_path / "run")
    run = run_alone(asked | {"checkpoint": str(first / "kept" / "checkpoint_00000003_validate")})
    log = [r for r in records(run) if "train/batch_loss" in r]
    assert [r["global_step"] for r in log] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(r["train/batch_loss"]) for r in log)
