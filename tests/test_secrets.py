"""No key gets into what a run leaves, or into Ray's logs; a key in the configuration is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ray_det import cli, connect
from ray_det.config import TrainJobConfig
from ray_det.types import UserError
from tests.jobs.run import JOBS
from tests.ranks import ROOT

CANARY = "canary0123456789abcdef0123456789abcdef01"  # as long as a wandb key
ENVIRONMENT = {
    "WANDB_API_KEY": CANARY,
    "HF_TOKEN": f"hf_{CANARY}",
    "AWS_SECRET_ACCESS_KEY": CANARY,
    "AWS_ACCESS_KEY_ID": f"AKIA{CANARY}",
    "https_proxy": f"http://user:{CANARY}@127.0.0.1:9",
}


def holding(folder: Path, text: bytes) -> list[str]:
    """Every file under a folder that holds a text, in its content or its name."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if text in path.read_bytes() or text in os.fsencode(path)]


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_and_ray_write_no_key_down(small_coco, tmp_path):
    """Two workers with all keys in their environment: in files, logs, configuration, checkpoints, wandb's records."""
    temporary = Path(tempfile.mkdtemp(prefix="rd"))  # short: Ray makes sockets in it
    try:
        arguments = ["--data.train", small_coco["train"], "--data.val", small_coco["val"], "--data.image_size", "96"]
        arguments += ["--model.name", "torchvision/fcos_shufflenet_v2_x0_5_fpn", "--model.weights", "none"]
        arguments += ["--train.epochs", "1", "--train.global_batch_size", "8", "--workers.num", "1"]
        arguments += ["--wandb.mode", "offline", "--storage", tmp_path, "--name", "run"]
        env = os.environ | ENVIRONMENT | {"RAY_TMPDIR": str(temporary), "HOME": str(temporary)}
        env.pop("RAY_ADDRESS", None)
        command = [sys.executable, JOBS / "train.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert CANARY not in done.stdout + done.stderr
        session = next((temporary / "ray").glob("session_2*"))
        assert len(list((session / "logs").iterdir())) > 10 and holding(tmp_path / "run", b"train/batch_loss")
        assert holding(tmp_path, CANARY.encode()) + holding(temporary, CANARY.encode()) == []
        assert list(temporary.rglob("auth_token")), "Ray's token authentication is off"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.parametrize(
    ("argument", "field"),
    [
        ('--model.config={{"hf_token": "{0}"}}', "the text of 'hf_token'"),
        (
            '--model.config={{"backbone_config": {{"use": [{{"API-KEY": 1, "api_key": "{0}"}}]}}}}',
            "the text of 'api_key'",
        ),
        ('--model.config={{"password": "{0}"}}', "the text of 'password'"),
        ('--model.config={{"auth": {{"secrets": ["{0}"]}}}}', "the text of 'secrets'"),
        ("--storage=s3://me:{0}@bucket/runs", "the password in a URI"),
        ("--data.train=https://me:{0}@host/train.json", "the password in a URI"),
    ],
)
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(argument, field):
    with pytest.raises(UserError, match="give it in the environment") as caught:
        cli.parse(TrainJobConfig, [argument.format(CANARY)], description="")
    assert str(caught.value).startswith(f"{argument.partition('=')[0]}: {field} would be written to config.yaml")
    assert CANARY not in str(caught.value)


def test_what_only_sounds_like_a_secret_passes():
    config = {"pad_token_id": 1, "num_tokens": 4, "token": "", "use_auth_token": False, "labels": ["password"]}
    parsed = TrainJobConfig.model_validate({"model": {"config": config}, "storage": "abfs://box@account.dfs.net/runs"})
    assert parsed.model.config == config


def test_nothing_of_ours_turns_rays_authentication_off(monkeypatch):
    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    connect.prepare_environment()
    assert not [name for name in os.environ if "AUTH" in name and name.startswith("RAY_")]
    sources = [*(ROOT / "ray_det").rglob("*.py"), *JOBS.glob("*.py")]
    assert sources and [path for path in sources if "AUTH_MODE" in path.read_text()] == []
