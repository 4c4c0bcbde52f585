"""Two processes, one run."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_det.storage import Folder
from ray_det.train import lock
from ray_det.types import UserError
from tests.jobs.run import run_job
from tests.ranks import ROOT

HOLD = """
import sys, time
from ray_det.storage import Folder
from ray_det.train import lock
lock.BEAT_S = 0.1
with lock.hold(Folder.at(sys.argv[1]), "cells", print):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """A process that holds the run `cells` of a storage."""
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    while not (tmp_path / ".locks" / "cells.json").exists():
        pass
    yield process
    process.kill()
    process.wait()


def take(storage: Path) -> None:
    with lock.hold(Folder.at(str(storage)), "cells", print):
        pass


def test_the_second_is_refused_with_the_name_of_the_first(holder, tmp_path, small_coco, capfd):
    assert run_job("train", "--name", "cells", "--storage", tmp_path, "--data.train", small_coco["train"]) == 2
    error = capfd.readouterr().err.strip()
    assert f"process {holder.pid} on" in error and "since 20" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "cells").exists()


def test_a_refused_process_leaves_the_lock_alone(holder, tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="is being trained by process"):
            take(tmp_path)


def test_another_run_of_the_storage_is_free(holder, tmp_path):
    with lock.hold(Folder.at(str(tmp_path)), "other", print):
        pass
    assert not (tmp_path / ".locks" / "other.json").exists()


def test_a_killed_holder_is_followed_at_once(holder, tmp_path, capfd):
    holder.kill()
    holder.wait()
    take(tmp_path)
    assert "watching" not in capfd.readouterr().out


def test_a_holder_that_no_longer_beats_is_followed_after_a_while(holder, tmp_path, monkeypatch, capfd):
    """As one on another machine, whose process cannot be asked for."""
    monkeypatch.setattr(lock, "WATCH_S", 1.0)
    holder.send_signal(signal.SIGSTOP)
    take(tmp_path)
    assert "watching for up to 1 s" in capfd.readouterr().out


def test_a_holder_beats_again_after_an_outage_of_its_storage(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    locks = tmp_path / ".locks"

    def beats() -> bool:
        time.sleep(0.5)
        return locks.is_dir() and (locks / "cells.json").exists()

    with lock.hold(Folder.at(str(tmp_path), 0.0), "cells", print):
        assert beats()
        for _ in range(2):
            shutil.rmtree(locks)
            locks.touch()  # nothing can be written there
            assert not beats()
            locks.unlink()
            assert beats()


def test_what_is_no_lock_holds_nothing(tmp_path):
    (tmp_path / ".locks").mkdir()
    for text in ("", "{", "[]", "{}", '{"pid": 1}'):
        (tmp_path / ".locks" / "cells.json").write_text(text)
        take(tmp_path)
