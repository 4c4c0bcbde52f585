"""The manifests, as `kubectl kustomize` builds them."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_det import cli
from ray_det.config import TrainJobConfig
from ray_det.tune.config import TuneJobConfig
from tests.cluster.rules import broken
from tests.ranks import ROOT

OVERLAYS = ("gke-spot", "eks-spot", "single-gpu", "kueue")
KUBERAY = ROOT / "cluster" / "kuberay"
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@cache
def built(overlay: str) -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", KUBERAY / "overlays" / overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {(document["kind"], document["metadata"]["name"]): document for document in yaml.safe_load_all(done.stdout)}


def of_ray(overlay: str) -> list[dict[str, Any]]:
    return [document for (kind, _), document in built(overlay).items() if kind in ("RayJob", "RayCluster")]


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod specs of a RayCluster: the head's first."""
    groups = [document["spec"]["headGroupSpec"], *document["spec"]["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_all_overlays_are_tested():
    assert sorted(path.name for path in (KUBERAY / "overlays").iterdir()) == sorted(OVERLAYS)


@every_overlay
def test_the_controller_takes_them(overlay):
    assert len(of_ray(overlay)) == 3
    assert [broken(document) for document in of_ray(overlay)] == [[], [], []]


@pytest.mark.parametrize(
    ("kind", "path", "value", "rule"),
    [
        ("RayJob", "metadata.name", "a" * 48, "name"),
        ("RayCluster", "metadata.name", "a" * 54, "name"),
        ("RayJob", "spec.suspend", True, "suspend needs"),
        ("RayJob", "spec.deletionStrategy", {"deletionRules": [{}]}, "deletionStrategy excludes"),
        ("RayJob", "spec.rayClusterSpec.rayVersion", "2.51.9", "needs rayVersion"),
        ("RayJob", "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "Always", "head restarts"),
        ("RayCluster", "spec.headGroupSpec.resources", {"cpu": "1"}, "head has resources"),
        ("RayCluster", "spec.enableInTreeAutoscaling", False, "autoscalerOptions without"),
    ],
)
def test_each_rule_can_be_broken(kind, path, value, rule):
    document = copy.deepcopy(next(d for d in of_ray("gke-spot") if d["kind"] == kind))
    if rule == "suspend needs":
        document["spec"]["shutdownAfterJobFinishes"] = False
    *parents, last = path.split(".")
    branch = document
    for parent in parents:
        branch = branch[parent]
    branch[last] = value
    assert [line for line in broken(document) if rule in line], broken(document)


@every_overlay
def test_every_job_has_the_patched_cluster(overlay):
    cluster = copy.deepcopy(built(overlay)["RayCluster", "ray-det"]["spec"])
    assert built(overlay)["RayJob", "ray-det-train"]["spec"]["rayClusterSpec"] == cluster
    sweep = built(overlay)["RayJob", "ray-det-tune"]["spec"]["rayClusterSpec"]
    workers = sweep["workerGroupSpecs"][0]
    assert workers["minReplicas"] == workers["replicas"] > 0  # a sweep does not ask for nodes
    cluster["workerGroupSpecs"][0] |= {"minReplicas": workers["minReplicas"], "replicas": workers["replicas"]}
    assert sweep == cluster
    assert all(re.match(r"IMAGE:\S+$", c["image"]) for pod in pods({"spec": cluster}) for c in pod["containers"])


@every_overlay
def test_pods_are_restricted_and_guarded(overlay):
    documents = built(overlay)
    cluster = documents["RayCluster", "ray-det"]
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for pod in pods(cluster):
        security = pod["containers"][0]["securityContext"]
        assert security["runAsNonRoot"] and not security["allowPrivilegeEscalation"]
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        labels = group["template"]["metadata"]["labels"]
        assert labels.items() >= documents["NetworkPolicy", "ray-det"]["spec"]["podSelector"]["matchLabels"].items()
        assert labels.items() >= documents["PodMonitor", "ray-det"]["spec"]["selector"]["matchLabels"].items()
        ports = {port["name"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert {p["port"] for p in documents["PodMonitor", "ray-det"]["spec"]["podMetricsEndpoints"]} <= ports


@every_overlay
def test_a_worker_drains_within_its_grace_period(overlay):
    for pod in pods(built(overlay)["RayCluster", "ray-det"])[1:]:
        program, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "drain.sh" and int(seconds) < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", ["gke-spot", "eks-spot"])
def test_spot_workers_and_a_head_on_demand(overlay):
    cluster = built(overlay)["RayCluster", "ray-det"]
    head, spot, on_demand = pods(cluster)
    first, second = cluster["spec"]["workerGroupSpecs"]
    assert "spot" in str(spot["nodeSelector"]) and "spot" in str(spot["tolerations"])
    assert "nvidia.com/gpu" in str(spot["tolerations"]) and "spot" not in str(on_demand["tolerations"])
    assert "spot" not in str(head.get("nodeSelector")) and head.get("nodeSelector", head.get("affinity"))
    assert first["priority"] > second["priority"] and first["minReplicas"] == 0


def test_kueue_counts_a_fixed_cluster():
    for document in of_ray("kueue"):
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        spec = document["spec"].get("rayClusterSpec", document["spec"])
        assert "enableInTreeAutoscaling" not in spec
        assert all(g["replicas"] == g["minReplicas"] == g["maxReplicas"] for g in spec["workerGroupSpecs"])
        assert document["kind"] != "RayJob" or document["spec"]["suspend"]


def test_the_jobs_options_are_options():
    files = built("gke-spot")["ConfigMap", "ray-det-config"]["data"]
    entries = {d["metadata"]["name"]: d["spec"]["entrypoint"] for d in of_ray("gke-spot") if d["kind"] == "RayJob"}
    for name, config in (("train", TrainJobConfig), ("tune", TuneJobConfig)):
        parsed = cli.from_yaml(config, files[f"{name}.yaml"])
        assert parsed.workers.use_gpu and parsed.workers.start_timeout_s > 600  # nodes are only started for it
        assert entries[f"ray-det-{name}"] == f"python /app/jobs/{name}.py --config /etc/ray_det/{name}.yaml"


@every_overlay
def test_no_secret_is_written_down(overlay):
    text = yaml.safe_dump(list(built(overlay).values()))
    assert ("Secret", "ray-det-keys") not in built(overlay)
    assert "secretRef" in text and not re.search(r"(?i)name: \w*(key|token|password)\n\s*value:", text)
    for document in of_ray(overlay):
        environment = yaml.safe_load(document["spec"].get("runtimeEnvYAML", "{}")).get("env_vars", {})
        assert set(environment) <= {"RAY_JOB_STOP_WAIT_TIME_S"}
