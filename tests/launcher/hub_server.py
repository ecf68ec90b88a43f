"""A small exact Hub: what ``snapshot_download`` asks of its HTTP API, answered from folders."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves ``models[name]``, a folder, at revision main or its commit.

    Args:
        models: a folder for each name; the name ``gated/...`` asks for conditions to be accepted.
    """

    def __init__(self, models: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = models
        self.fetched: list[str] = []  # files whose content was sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        """Nothing: a test shows what it asserts."""

    def _answer(self, *, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, model, kind, revision, *file = [*parts[2 if is_api else 0 :], "", "", ""][:99]
        name, path = f"{owner}/{model}", "/".join(filter(None, file))
        folder = self.server.models.get(name)
        if folder is None:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("", "main", COMMIT):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif owner == "gated" and not is_api:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif is_api:
            self._send(200, json.dumps(_described(name, folder, kind)).encode(), {})
        else:
            self._send_file(folder / path, path, with_body=with_body)

    def _send_file(self, file: Path, path: str, *, with_body: bool) -> None:
        content = file.read_bytes()
        etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        if with_body:
            self.server.fetched.append(path)
        self._send(200, content, headers, with_body=with_body)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _described(name: str, folder: Path, kind: str) -> object:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if kind == "tree":
        return [
            {
                "type": "file",
                "path": str(path.relative_to(folder)),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest(),
            }
            for path in files
        ]
    siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
    return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}


@contextmanager
def serve_hub(models: dict[str, Path]) -> Iterator[Hub]:
    """A Hub on a free port of this machine, while the block runs."""
    with Hub(models) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
