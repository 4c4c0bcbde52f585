"""What is other than with Ray's own `TorchTrainer`, and what is not."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import sys
from functools import partial
from ray import cloudpickle
from ray.train import RunConfig, ScalingConfig
from ray_det.data.pipeline import warm_up
from ray_det.train import launch
from ray_det.train.job import train_worker
from ray_det.train.torch_trainer import TorchTrainer

scaling, run = ScalingConfig(num_workers=1), RunConfig(name="run", storage_path=sys.argv[1])
trainer = TorchTrainer(train_worker, {}, scaling, run, partial(warm_up, 1))
given = trainer._get_train_func(), trainer.train_run_context, trainer._create_default_callbacks()
cloudpickle.loads(cloudpickle.dumps(given))
assert "torch" not in sys.modules
"""

WAITING = """
import os, sys, threading, time
import ray
from ray.train import RunConfig, ScalingConfig
from ray_det.connect import end
from ray_det.train.torch_trainer import TorchTrainer

def look():
    time.sleep(5)
    before = time.process_time()
    time.sleep(4)
    print(time.process_time() - before, flush=True)
    end()
    os._exit(0)

ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
threading.Thread(target=look).start()
scaling = ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 2})
TorchTrainer(print, {}, scaling, RunConfig(name="run", storage_path=sys.argv[1]), print).fit()
"""

TRIAL = """
import os, sys, time
import ray
from ray.util import placement_group_table
from ray_det.train.torch_trainer import TorchTrainer

def states():
    return [group["state"] for group in placement_group_table().values()]

def wait_for(what):
    until = time.monotonic() + 90
    while not what():
        assert time.monotonic() < until, states()
        time.sleep(0.5)

def train(config):
    open(config["begun"], "w").close()
    time.sleep(600)

class Trial:
    def fit(self, folder):
        from ray.train import RunConfig, ScalingConfig
        run = RunConfig(name="run", storage_path=folder)
        TorchTrainer(train, {"begun": begun}, ScalingConfig(num_workers=1), run, print).fit()

begun = os.path.join(sys.argv[1], "begun")
ray.init("local", num_cpus=2, include_dashboard=True, log_to_driver=False)
cluster = {"env_vars": {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}}
trial = ray.remote(Trial).options(num_cpus=0, runtime_env=cluster).remote()
trial.fit.remote(sys.argv[1])
wait_for(lambda: os.path.exists(begun))
assert states() == ["CREATED"]
ray.kill(trial)
wait_for(lambda: states() == ["REMOVED"])
"""

ASKED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "ACCELERATE_TORCH_DEVICE")


def test_the_driver_does_without_torch(tmp_path):
    """Torch is on the way to the first step, and holds hundreds of MB as long as the run takes."""
    done = subprocess.run([sys.executable, "-c", DRIVER, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_a_driver_that_waits_for_room_does_not_compute(tmp_path):
    done = subprocess.run([sys.executable, "-c", WAITING, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 2  # CPU seconds of 4


@pytest.mark.slow
@pytest.mark.ray
def test_what_a_killed_trial_had_reserved_is_free_while_the_sweep_goes_on(tmp_path):
    done = subprocess.run([sys.executable, "-c", TRIAL, tmp_path], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def describe(config: dict[str, str]) -> None:
    """Writes down what torch and its libraries find on this worker."""
    import ray.train.torch
    import torch
    import torch.distributed as dist

    mine = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(mine)
    seen = {name: os.environ.get(name) for name in ASKED}
    seen |= {"backend": dist.get_backend(), "sum": mine.item(), "device": str(ray.train.torch.get_device())}
    Path(config["to"], f"{dist.get_rank()}.json").write_text(json.dumps(seen))


@pytest.mark.slow
@pytest.mark.ray
def test_workers_find_torch_as_under_rays_own_and_the_driver_keeps_its_log(ray_cluster, tmp_path):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer as RaysOwn

    from ray_det.train.torch_trainer import TorchTrainer

    log = logging.getLogger("a_users_own")
    log.addHandler(logging.FileHandler(tmp_path / "log.txt", "w"))
    found = []
    for own in (True, False):
        to = tmp_path / str(own)
        to.mkdir()
        scaling, run = ScalingConfig(num_workers=2), RunConfig(name="run", storage_path=str(to))
        config = {"to": str(to)}
        if own:
            trainer = RaysOwn(describe, train_loop_config=config, scaling_config=scaling, run_config=run)
        else:
            trainer = TorchTrainer(describe, config, scaling, run, print)
        trainer.fit()
        found.append([json.loads((to / f"{rank}.json").read_text()) for rank in range(2)])
    assert found[0] == found[1]
    assert [worker["sum"] for worker in found[1]] == [3.0, 3.0]
    log.warning("as before")
    assert (tmp_path / "log.txt").read_text() == "as before\n"
