"""A hub on this machine with one model, which counts how often it is asked for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class LocalHub(ThreadingHTTPServer):
    """Hands out a folder's files as those of a model, under any name.

    Attributes:
        asked: Number of requests for facts about the model.
        is_busy: Refuse every request as one too many.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked = 0
        self.is_busy = False

    @property
    def address(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does, of which the parts are there that a load needs."""

    server: LocalHub

    def do_GET(self) -> None:
        body = self._begin()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self._begin()

    def _begin(self) -> bytes:
        hub = self.server
        if hub.is_busy:
            return self._answer(429, b"", {})
        if self.path.startswith("/api/models/") and "/tree/" not in self.path:
            hub.asked += 1
            facts = {"id": "limbeck-tests/model", "sha": COMMIT, "siblings": [], "tags": []}
            return self._answer(200, json.dumps(facts).encode(), {})
        file = hub.folder / self.path.split("?")[0].rpartition("/")[2]
        if not file.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        body = file.read_bytes()
        return self._answer(200, body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> bytes:
        self.send_response(status)
        for name, value in {
            **headers,
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        return body

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def local_hub(folder: Path) -> Iterator[LocalHub]:
    """A hub that runs meanwhile."""
    with LocalHub(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
