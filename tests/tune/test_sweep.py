"""Real sweeps with Ray Tune: a small one, then clusters that are full, several nodes, kills and stops."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_det import cli
from ray_det.config import TrainJobConfig
from ray_det.report.wandb_log import log_records
from tests.jobs.run import JOBS, run_job
from tests.models.zoo import FAMILIES
from tests.ranks import ROOT
from tests.train.nodes import WORKER_CPUS, nodes

pytestmark = pytest.mark.ray
STEPS = 4  # per epoch: 16 images in global batches of 4


def config(small_coco: dict[str, Path], storage: Path, *, epochs: int, workers: int = 1) -> dict[str, Any]:
    return {
        "name": "sweep",
        "storage": str(storage),
        "data": {split: str(path) for split, path in small_coco.items()} | {"image_size": 96},
        "model": FAMILIES["fcos"].model_dump(),
        "train": {"epochs": epochs, "global_batch_size": 4, "precision": "fp32"},
        "workers": {"num": workers, "threads": 1},
        "wandb": {"mode": "offline"},
    }


def write(asked: dict[str, Any]) -> Path:
    Path(asked["storage"]).mkdir(parents=True)
    file = Path(asked["storage"]) / "config.json"
    file.write_text(json.dumps(asked))
    return file


def table(folder: Path) -> dict[str, dict[str, str]]:
    return {row["trial"]: row for row in csv.DictReader((folder / "trials.csv").read_text().splitlines())}


def wandb_of(trial: Path) -> list[Any]:
    """(run id, group, lr, exit code) of each of its local files."""
    from wandb.proto import wandb_internal_pb2 as pb

    found = []
    for file in sorted((trial / "wandb").glob("offline-run-*/*.wandb")):
        records = []
        for data in log_records(file.read_bytes()):
            records.append(pb.Record())  # pyright: ignore[reportAttributeAccessIssue]
            records[-1].ParseFromString(data)
        run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        values = {item.key: json.loads(item.value_json) for item in run.config.update}
        ends = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
        found.append((run.run_id, run.run_group, values["optim"]["lr"], ends))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_has_a_winner_and_a_failed_trial_is_a_result(small_coco, tmp_path, capfd):
    asked = config(small_coco, tmp_path / "runs", epochs=2)
    asked["tune"] = {"search": "grid"}
    asked["space"] = {"optim": {"lr": "choice(0.001, 1e+30)"}}
    file, folder = write(asked), tmp_path / "runs" / "sweep"
    assert run_job("tune", "--config", file) == 0
    assert capfd.readouterr().out.count("usable in training") == 3  # splits, prepared once for all trials
    rows = table(folder)
    assert [(row["state"], row["optim.lr"]) for row in rows.values()] == [("finished", "0.001"), ("failed", "1e+30")]
    assert "not finite" in rows["trial_001"]["error"] and rows["trial_000"]["test/AP"]
    best, _ = cli.parse(TrainJobConfig, ["--config", str(folder / "best.yaml")], description="", recipes=True)
    assert (best.name, best.optim.lr, best.wandb.group) == ("sweep-best", 1e-3, None)
    assert "<svg" in (folder / "sweep.html").read_text()
    for name, rate, code in (("trial_000", 1e-3, 0), ("trial_001", 1e30, 1)):
        ((_, *said),) = wandb_of(folder / name)
        assert said == ["sweep", rate, [code]]
    capfd.readouterr()
    assert run_job("tune", "--config", file) == 0
    assert "is finished" in capfd.readouterr().out
    assert run_job("tune", "--config", file, "--space.optim.lr", "choice(0.1)") == 2
    assert "space.optim.lr" in capfd.readouterr().err


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_that_can_never_fit_says_so_at_once(small_coco, tmp_path, capfd):
    file = write(config(small_coco, tmp_path / "runs", epochs=2))
    began = time.monotonic()
    assert run_job("tune", "--config", file, "--workers.num", 4, "--workers.cpus", 2) == 2
    error = capfd.readouterr().err.strip()
    assert "no room for a trial: 4 workers with 2 CPUs each" in error and len(error.splitlines()) == 1
    assert time.monotonic() - began < 30  # the cluster is not waited for, which takes a minute
    assert run_job("tune", "--config", file, "--data.val", "none") == 2
    assert "it needs --data.val" in capfd.readouterr().err


def start(file: Path | None, *more: object, address: str | None = None) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-W", "ignore", str(JOBS / "tune.py"), *map(str, more)]
    command += ["--config", str(file)] if file else []
    environment |= {"RAY_ADDRESS": address} if address else {}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(driver: subprocess.Popen[str], status: int = 0, timeout_s: float = 500) -> str:
    try:
        output, _ = driver.communicate(timeout=timeout_s)
    finally:
        driver.kill()
    assert driver.returncode == status, output
    return output


def lines(folder: Path) -> dict[str, list[str]]:
    return {log.parent.name: log.read_text().splitlines() for log in folder.glob("trial_*/metrics.jsonl")}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_six_trials_of_two_workers_on_two_cpus_do_not_starve_one_another(small_coco, tmp_path):
    """On a machine of two cores: its own Ray, on which one trial runs at a time."""
    asked = config(small_coco, tmp_path / "runs", epochs=1, workers=2) | {"tune": {"trials": 6}}
    file = write(asked)
    command = ["taskset", "-c", "0,1"]
    driver = subprocess.Popen(
        [*command, sys.executable, "-W", "ignore", str(JOBS / "tune.py"), "--config", str(file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = ended(driver)
    assert "6 trials to run, 1 at a time, with 2 workers each" in output
    assert [row["state"] for row in table(tmp_path / "runs" / "sweep").values()] == ["finished"] * 6


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_workers_of_a_trial_are_on_two_nodes(small_coco, tmp_path):
    """Nodes for four workers, and two CPUs for loaders: two trials of two workers at a time."""
    asked = config(small_coco, tmp_path / "runs", epochs=1, workers=2) | {"tune": {"trials": 3}}
    asked["workers"] |= {"cpus": WORKER_CPUS}
    with nodes(workers=4) as cluster:
        cluster.cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
        output = ended(start(write(asked), address=str(cluster.cluster.address)))
    assert "3 trials to run, 2 at a time, with 2 workers each" in output
    assert [row["state"] for row in table(tmp_path / "runs" / "sweep").values()] == ["finished"] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_sweep_goes_on_and_what_has_ended_does_not_run_again(small_coco, tmp_path):
    asked = config(small_coco, tmp_path / "runs", epochs=4) | {"tune": {"trials": 3, "scheduler": "none"}}
    file, folder = write(asked), tmp_path / "runs" / "sweep"
    first = start(file, "--tune.concurrent", 1)
    while len(lines(folder).get("trial_001", [])) < STEPS + 3:  # in its second epoch, when the first trial is through
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    processes = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = lines(folder)
    output = ended(start(file, "--tune.concurrent", 1))
    psutil.wait_procs(processes, timeout=60)
    assert "1 trials have ended, 1 were interrupted" in output
    assert "trial_001: goes on from step" in output and "trial_000:" not in output
    after = lines(folder)
    assert after["trial_000"] == before["trial_000"]
    for name in ("trial_000", "trial_001", "trial_002"):
        steps = [json.loads(line)["global_step"] for line in after[name] if "train/batch_loss" in line]
        assert steps == list(range(1, 4 * STEPS + 1)), name
        (run_id, group, _, _), *more = wandb_of(folder / name)
        assert group == "sweep" and {said[0] for said in more} <= {run_id}
    assert [row["state"] for row in table(folder).values()] == ["finished"] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_signal_stops_all_trials_with_a_checkpoint_and_leaves_no_process(small_coco, tmp_path):
    asked = config(small_coco, tmp_path / "runs", epochs=40) | {"tune": {"trials": 2, "scheduler": "none"}}
    file, folder = write(asked), tmp_path / "runs" / "sweep"
    driver = start(file)
    while min((len(lines(folder).get(f"trial_00{i}", [])) for i in (0, 1)), default=0) < STEPS + 3:
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.05)
    processes = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGINT)
    output = ended(driver, 128 + signal.SIGINT)
    assert "the same command goes on" in output and "Last result" not in output  # Tune's words
    names = [process.name() for process in psutil.wait_procs(processes, timeout=90)[1]]
    assert names == []
    for name in ("trial_000", "trial_001"):
        assert json.loads((folder / name / "trial.json").read_text())["state"] == "running"
        newest = max(folder.glob(f"{name}/checkpoint_*/state.json"), key=lambda path: path.stat().st_mtime)
        steps = [json.loads(line)["global_step"] for line in lines(folder)[name] if "train/batch_loss" in line]
        assert json.loads(newest.read_text())["state"]["global_step"] == steps[-1] < 40 * STEPS
        assert [said[-1] for said in wandb_of(folder / name)] == [[0]]
