"""A storage far away: what is asked of the server on loopback arrives late, and is counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ray_det.data import files
from tests.s3 import S3Server


class FarAway:
    """A client sends a request at once, and no other before it has the answer: what is read here at once is one."""

    def __init__(self, server_port: int, late_s: float) -> None:
        self._server_port, self._late_s = server_port, late_s
        self._stopped, self._listens = asyncio.Event(), threading.Event()
        self._under_way = self.requests = self.most_at_once = self.answered_bytes = self.port = 0

    async def serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with await asyncio.start_server(self._connect, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            self._listens.set()
            await self._stopped.wait()

    def wait(self) -> None:
        assert self._listens.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._server_port)
        await asyncio.gather(self._carry(reader, back, request=True), self._carry(there, writer, request=False))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, request: bool) -> None:
        try:
            while data := await reader.read(1 << 16):
                if request:
                    await self._on_the_way()
                else:
                    self.answered_bytes += len(data)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def _on_the_way(self) -> None:
        self.requests += 1
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        await asyncio.sleep(self._late_s)
        self._under_way -= 1


@contextmanager
def far_away(server: S3Server, monkeypatch: pytest.MonkeyPatch, late_s: float) -> Iterator[FarAway]:
    """`s3://bucket/…` is on the server, to which every request takes so long. For reading."""
    between = FarAway(int(server.endpoint.rpartition(":")[2]), late_s)
    thread = threading.Thread(target=lambda: asyncio.run(between.serve()))
    thread.start()
    try:
        between.wait()
        with monkeypatch.context() as patched:
            patched.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{between.port}")
            _forget()
            yield between
    finally:
        _forget()
        between.stop()
        thread.join()


def _forget() -> None:
    files._filesystem.cache_clear()
    files._opened.cache_clear()
