"""Alerts, by promtool; the board and the alerts name what is there; a live run shows what they name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from typing import Any

import pytest
import yaml

from ray_det.train.gauges import OF_RANK, OF_RUN, Gauges
from tests.cluster.running import cluster
from tests.ranks import ROOT
from tests.train.disturb import EPOCHS, config, steps_done, write

MONITORING = ROOT / "cluster" / "monitoring"
OURS = {f"ray_{name}" for name, _ in (OF_RUN | OF_RANK).values()}
METRIC = re.compile(r"\bray_\w+")


def alerts() -> dict[str, Any]:
    """A rule file."""
    return yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]


def named() -> set[str]:
    """Metrics in the queries of the board and of the alerts."""
    board = json.loads((MONITORING / "board.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    queries += [rule["expr"] for group in alerts()["groups"] for rule in group["rules"]]
    return {name for query in queries for name in METRIC.findall(query)}


def of_machines_with_gpus() -> set[str]:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    return {f"ray_{name}" for name in METRICS_GAUGES if "gpu" in name or "gram" in name} | {"ray_det_gpu_memory_gb"}


def test_alerts_fire_when_they_should(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(alerts()))
    shutil.copy(MONITORING / "alerts_test.yaml", tmp_path)
    done = subprocess.run([promtool, "test", "rules", tmp_path / "alerts_test.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_to_fire():
    tested = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
    fired = {rule["alertname"] for test in tested for rule in test["alert_rule_test"] if rule.get("exp_alerts")}
    assert fired == {rule["alert"] for group in alerts()["groups"] for rule in group["rules"]}


def test_board_and_alerts_name_our_gauges():
    assert {name for name in named() if name.startswith("ray_det_")} == OURS


def test_gauges_pass_over_what_is_no_number():
    gauges = Gauges("runs/run", 0)
    gauges.publish({"train/batch_loss": None, "train/grad_norm": float("nan"), "val/AP": 0.5, "unknown": "text"})
    assert gauges._latest == {"val/AP": 0.5}


@pytest.mark.ray
@pytest.mark.slow
def test_a_live_run_shows_every_number_and_logs_json(small_coco, tmp_path):
    asked = config(small_coco, tmp_path / "runs")
    asked["train"] |= {"epochs": 40 * EPOCHS, "micro_batch_size": 1}
    asked["eval"]["every_epochs"] = 1
    asked["workers"]["num"] = 2
    run = tmp_path / "runs" / "run"
    with cluster(tmp_path, workers=1, cpus=4) as running:
        running.submit("--no-wait", "train", "--config", write(asked, tmp_path / "asked"), "--name", "run")
        wanted = (named() | OURS) - of_machines_with_gpus() - {"ray_det_test_ap"}
        deadline = time.monotonic() + 300
        while missing := wanted - {line.split("{")[0] for line in running.metrics()}:
            assert time.monotonic() < deadline, f"{missing}\n{running.submit('logs', 'train-run-1')}"
            time.sleep(2)
        time.sleep(30)  # what is set once an epoch stays, where Ray forgets it after 20 seconds
        lines = running.metrics()
        running.submit("stop", "train-run-1")
        logs = [log for node in running.sessions for log in (node / "logs" / "train").glob("*app-worker*")]
        entries = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    assert steps_done(run)
    ranks = {re.findall(r'rank="(\d)"', line)[0] for line in lines if line.startswith("ray_det_step_seconds{")}
    assert ranks == {"0", "1"}
    ours = [line for line in lines if line.startswith("ray_det_")]
    assert ours and all('run="runs/run"' in line for line in ours)
    values = {line.split("{")[0]: float(line.split()[-1]) for line in ours}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert values["ray_det_loss"] in [record.get("train/batch_loss") for record in records]
    assert values["ray_det_val_ap"] in [record.get("val/AP") for record in records]
    kept = [entry for entry in entries if entry["message"].startswith("kept checkpoint")]
    assert kept and kept[0].keys() >= {"run", "rank", "epoch", "step", "node_id", "levelname", "asctime"}
    assert kept[-1]["run"] == "runs/run" and kept[-1]["rank"] == 0 and str(kept[-1]["step"]) in kept[-1]["message"]
