"""What KubeRay's controller refuses, of the fields that our manifests use; its schema does not say these."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Document = dict[str, Any]
NAME_LENGTHS = {"RayJob": 47, "RayCluster": 53}
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")


def broken(document: Document) -> list[str]:
    """Rules that a RayJob or RayCluster breaks."""
    kind, name, spec = document["kind"], document["metadata"]["name"], document["spec"]
    found = [] if len(name) <= NAME_LENGTHS[kind] and DNS_LABEL.fullmatch(name) else [f"name {name}"]
    cluster = spec
    if kind == "RayJob":
        found += _of_job(spec)
        cluster = spec.get("rayClusterSpec")
    return found + (list(_of_cluster(cluster)) if cluster else [])


def _of_job(spec: Document) -> Iterator[str]:
    shut_down, rules = spec.get("shutdownAfterJobFinishes", False), spec.get("deletionStrategy")
    if spec.get("suspend") and not shut_down:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished") and not shut_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if rules and (shut_down or "ttlSecondsAfterFinished" in spec):
        yield "deletionStrategy excludes shutdownAfterJobFinishes and ttlSecondsAfterFinished"
    if bool(spec.get("rayClusterSpec")) == bool(spec.get("clusterSelector")):
        yield "a job needs a cluster: one of rayClusterSpec and clusterSelector"
    if spec.get("activeDeadlineSeconds", 1) <= 0 or spec.get("backoffLimit", 0) < 0:
        yield "activeDeadlineSeconds must be positive, backoffLimit not negative"
    if spec.get("submissionMode") == "SidecarMode":
        policy = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].get("restartPolicy", "Never")
        if policy != "Never" or {"submitterPodTemplate", "submitterConfig"} & spec.keys():
            yield "SidecarMode needs restartPolicy Never and takes no submitter"


def _of_cluster(spec: Document) -> Iterator[str]:
    groups = [("head", spec["headGroupSpec"]), *((g["groupName"], g) for g in spec.get("workerGroupSpecs", ()))]
    scaled, options = spec.get("enableInTreeAutoscaling", False), spec.get("autoscalerOptions", {})
    for name, group in groups:
        start, pod = group["rayStartParams"], group["template"]["spec"]
        if not pod["containers"]:
            yield f"{name} has no container"
        if group.get("resources") and set(RESOURCES) & start.keys():
            yield f"{name} has resources in rayStartParams and in resources"
        if "labels" in start:
            yield f"{name} has labels in rayStartParams"
        if scaled and options.get("version") == "v2" and pod.get("restartPolicy", "Never") != "Never":
            yield f"{name} restarts, under autoscaler v2"
        if name != "head" and not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"{name} has replicas out of its range"
    if options and not scaled:
        yield "autoscalerOptions without enableInTreeAutoscaling"
    if spec.get("authOptions", {}).get("mode") == "token":
        version = tuple(map(int, spec.get("rayVersion", "0").split(".")))
        if version < (2, 52):
            yield "token authentication needs rayVersion 2.52"
