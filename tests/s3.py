"""A real S3 server (SeaweedFS) on loopback, for tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

BUCKET = "bucket"
KEY, SECRET = "test-key", "test-secret-of-the-local-server"


def nowhere() -> dict[str, str]:
    """An environment in which no object store answers."""
    return _environment(f"127.0.0.1:{free_ports(1)[0]}")


def _environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://{endpoint}",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class S3Server:
    """Can be stopped, started again with what it had, and frozen.

    Args:
        room_mb: what may be written in its life; what is deleted counts.
    """

    def __init__(self, folder: Path, room_mb: int) -> None:
        self._folder, self._volumes, self._volume_mb = folder, 16, -(-room_mb // 16)
        (folder / "data").mkdir(parents=True)
        (folder / "master").mkdir()
        admin = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [admin]}))
        self._ports = free_ports(8)
        self.endpoint = f"127.0.0.1:{self._ports[6]}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = map(str, self._ports)
        options = {
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": self._folder / "data",
            "master.dir": self._folder / "master",
            "master.port": master,
            "master.port.grpc": master_grpc,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": str(self._volume_mb),
            "volume.port": volume,
            "volume.port.grpc": volume_grpc,
            "volume.max": str(self._volumes),
            "filer.port": filer,
            "filer.port.grpc": filer_grpc,
            "filer.localSocket": self._folder / "filer.sock",
            "s3.port": s3,
            "s3.port.grpc": s3_grpc,
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            "s3.config": self._folder / "s3.json",
        }
        weed = str(Path(sys.executable).with_name("weed"))
        command = [weed, "server", "-s3", *(f"-{name}={value}" for name, value in options.items())]
        log = (self._folder / "log").open("ab")
        self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)
        self._wait()

    def stop(self) -> None:
        """Connections are refused from now on."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """Connections are taken, and never answered."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def _wait(self, timeout_s: float = 60) -> None:
        """Until the bucket can be written to."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                filesystem = fs.S3FileSystem(
                    access_key=KEY,
                    secret_key=SECRET,
                    endpoint_override=self.endpoint,
                    scheme="http",
                    region="us-east-1",
                    allow_bucket_creation=True,
                )
                filesystem.create_dir(BUCKET)
                with filesystem.open_output_stream(f"{BUCKET}/ready") as stream:
                    stream.write(b"1")
                return
            except OSError:
                assert self._process and self._process.poll() is None, (self._folder / "log").read_text()[-3000:]
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


@contextmanager
def s3_server(folder: Path, room_mb: int = 32_000) -> Iterator[S3Server]:
    """A started server, with the environment set so that `s3://bucket/…` is on it."""
    server = S3Server(folder, room_mb)
    settings = _environment(server.endpoint)
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        server.start()
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
