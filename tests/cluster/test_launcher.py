"""Dockerfile, `ray up` and the one version of Ray that all of them have."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.test_kuberay import OVERLAYS, built, of_ray, pods
from tests.ranks import ROOT

CLUSTER = ROOT / "cluster"
every_cloud = pytest.mark.parametrize("cloud", ["aws", "gcp"])


def launcher(cloud: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "launcher" / f"{cloud}.yaml").read_text())


@every_cloud
def test_ray_takes_the_launchers(cloud):
    filled = prepare_config(launcher(cloud))
    validate_config(filled)
    commands = [line for key, lines in filled.items() if key.endswith("_commands") for line in lines]
    assert "whl" not in str(commands) and "0.0.0.0" not in str(
        commands
    )  # Ray's defaults: a nightly build, an open dashboard
    assert filled["docker"]["pull_before_run"] and "RAY_AUTH_MODE=token" in str(filled["docker"]["run_options"])
    assert "~/.ray/auth_token" in filled["file_mounts"]
    assert "drain.sh --watch " + cloud in str(filled["worker_start_ray_commands"])


@every_cloud
def test_drivers_are_on_demand_and_most_workers_on_spot(cloud):
    types = launcher(cloud)["available_node_types"]
    on_spot = {name: "spot" in str(kind["node_config"]).lower() for name, kind in types.items()}
    assert on_spot == {"head": False, "gpu-spot": True, "gpu-on-demand": False}
    assert types["head"]["resources"]["CPU"] == 0 and types["gpu-spot"]["resources"]["GPU"] == 1
    assert types["gpu-spot"]["max_workers"] > types["gpu-on-demand"]["max_workers"]


def test_machines_of_aws_are_not_kept_and_not_open():
    config = launcher("aws")
    assert config["provider"]["cache_stopped_nodes"] is False
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
        assert kind["node_config"]["ImageId"] != "latest_dlami"
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])


def test_the_dockerfile_is_clean():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, CLUSTER / "docker" / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_runs_as_a_number_and_holds_what_pods_call():
    text = (CLUSTER / "docker" / "Dockerfile").read_text()
    assert re.findall(r"^USER (.*)", text, re.MULTILINE) == ["1000:100"]
    assert "drain.sh /usr/local/bin/drain.sh" in text and "WORKDIR /app" in text
    copied = re.findall(r"^COPY (?:--chmod=\d+ )?(?!--from)(.*) \S+$", text, re.MULTILINE)
    sent = (CLUSTER / "docker" / "Dockerfile.dockerignore").read_text()
    for source in " ".join(copied).replace("uv.loc[k]", "uv.lock").split():
        assert f"!{source}" in sent and (source == "uv.lock" or (ROOT / source).exists())


def test_one_version_of_ray():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (ray,) = re.findall(r"ray==([\d.]+)", " ".join(project["tool"]["uv"]["constraint-dependencies"]))
    assert metadata.version("ray") == ray
    tag = f"IMAGE:{project['project']['version']}-ray{ray}"
    dockerfile = (CLUSTER / "docker" / "Dockerfile").read_text()
    assert f"ARG RAY={ray}\n" in dockerfile and f"-t {tag} ." in dockerfile
    for overlay in OVERLAYS:
        assert {d["spec"].get("rayClusterSpec", d["spec"])["rayVersion"] for d in of_ray(overlay)} == {ray}
        assert {p["containers"][0]["image"] for p in pods(built(overlay)["RayCluster", "ray-det"])} == {tag}
    assert {launcher(cloud)["docker"]["image"] for cloud in ("aws", "gcp")} == {tag}
