"""One driver for a run: a lock file beside the run folders, kept alive by beats.

Clocks of machines differ, so times of another machine are shown and never compared: a holder is gone if its process
is (on this machine) or if its beat stands still while it is watched.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from json import dumps
from typing import Any

from ray_det.storage import Folder, StorageError
from ray_det.types import UserError

BEAT_S = 5.0
WATCH_S = 20.0


@contextmanager
def hold(storage: Folder, name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Be the only driver of the run `name` of a storage. Two that start within a second may not see each other.

    Raises:
        UserError: another process is; the message says which, and since when.
    """
    folder, file = storage / ".locks", f"{name}.json"
    _wait_for_a_dead_holder(folder, file, name, say)
    me = {"token": secrets.token_hex(8), "host": socket.gethostname(), "namespace": _namespace(), "pid": os.getpid()}
    me["since"] = datetime.now().astimezone().isoformat(timespec="seconds")
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while True:
            number += 1
            try:
                folder.write_text(file, dumps(me | {"beat": number}))
            except (OSError, StorageError):
                pass  # the next one may reach the storage
            if ended.wait(BEAT_S):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError, StorageError):  # it is seen to be dead where this process is gone
            if (_read(folder, file) or {}).get("token") == me["token"]:
                (folder / file).delete()


def _wait_for_a_dead_holder(folder: Folder, file: str, name: str, say: Callable[[str], None]) -> None:
    first = _read(folder, file)
    if first is None or _is_gone(first):
        return
    holder = f"process {first['pid']} on {first['host']}, since {first['since']}"
    say(f"run {name} is held by {holder}: watching for up to {WATCH_S:g} s whether it lives")
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT_S))
        now = _read(folder, file)
        if now is None or _is_gone(now):
            return
        if now != first:
            raise UserError(f"run {name} is being trained by {holder}: stop that, or choose another --name")


def _read(folder: Folder, file: str) -> dict[str, Any] | None:
    """The lock; None where there is none, or nothing that this version wrote."""
    try:
        lock = folder.read_json(file)
        return lock if {"token", "host", "namespace", "pid", "since", "beat"} <= lock.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _namespace() -> str:
    """Of process ids: two containers may share a host's name and not see each other's processes."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not on Linux
        return ""


def _is_gone(lock: dict[str, Any]) -> bool:
    if (lock["host"], lock["namespace"]) != (socket.gethostname(), _namespace()):
        return False
    try:
        os.kill(int(lock["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
