"""As much of a wandb server as its client needs to go online, on loopback, which can break down."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG = 0


class Server:
    """Answers until `fails_with` is set: an HTTP status, or HANG."""

    def __init__(self) -> None:
        self.fails_with: int | None = None
        self.requests = 0
        self.ended = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:  # noqa: N802  the library's name
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.requests += 1
                if server.fails_with == HANG:
                    server.ended.wait()
                if server.fails_with is not None:
                    return self._reply(server.fails_with or 500, {"errors": [{"message": "broken down"}]})
                if "graphql" not in self.path:
                    return self._reply(200, {})
                asked = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                self._reply(200, {"data": _answer(json.loads(asked))})

            do_GET = do_PUT = do_POST  # noqa: N815

            def _reply(self, status: int, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@contextmanager
def wandb_server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.http.shutdown()
        server.http.server_close()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    query, given = request["query"], request.get("variables") or {}
    if "upsertBucket" in query:
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
        name = given.get("name")
        bucket = {"id": "b", "name": name, "displayName": name, "historyLineCount": 0, "project": project}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if "createRunFiles" in query:
        files = [{"name": name, "uploadUrl": ""} for name in given.get("files", [])]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
    return {}
