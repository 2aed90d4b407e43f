"""The few answers of a model hub that its client needs, over real HTTP on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A hub whose models are folders.

    Attributes:
        models: by their ids.
        url: where it answers.
        requests: method, file and range (or None) of each request for a file.
        stall: of this file only half is sent; then ``stalled`` is set, and ``go_on`` waited for.
        broken: of this file only half is sent, once, and the connection is closed.
        gone: parts of this file are given still, but not the whole.
        ranges: whether parts of a file can be asked for.
    """

    models: dict[str, Path] = field(default_factory=dict)
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    stall: str | None = None
    broken: str | None = None
    gone: str | None = None
    ranges: bool = True
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def downloads(self) -> list[str]:
        """The files that were asked for as a whole, in that order."""
        return [name for method, name, part in self.requests if method == "GET" and part is None]

    def files(self, model: str) -> list[Path]:
        folder = self.models[model]
        return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self.describe("/".join(parts[2:4]), parts[4:])
            return self.file("/".join(parts[:2]), "/".join(parts[4:]))

        def describe(self, model: str, rest: list[str]) -> None:
            if model not in hub.models:
                return self.refuse("RepoNotFound")
            if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
                return self.refuse("RevisionNotFound")
            entries = []
            for path in hub.files(model):
                content = (hub.models[model] / path).read_bytes()
                entries.append((path.as_posix(), len(content), hashlib.sha1(content).hexdigest()))
            if rest[:1] == ["tree"]:
                return self.send_json(
                    [{"type": "file", "path": n, "size": s, "oid": o} for n, s, o in entries]
                )
            siblings = [{"rfilename": n, "size": s, "blobId": o} for n, s, o in entries]
            return self.send_json({"id": model, "sha": COMMIT, "siblings": siblings})

        def file(self, model: str, name: str) -> None:
            path = hub.models.get(model, Path("/nowhere")) / name
            whole = self.headers.get("Range") is None
            if not path.is_file() or (whole and name == hub.gone):
                return self.refuse("EntryNotFound")
            hub.requests.append((self.command, name, self.headers.get("Range")))
            content = path.read_bytes()
            first, last, status = 0, len(content) - 1, 200
            if hub.ranges and (wanted := self.headers.get("Range")):
                ends = wanted.removeprefix("bytes=").split("-")
                first, last, status = int(ends[0]), min(int(ends[1] or last), last), 206
            body = content[first : last + 1]
            self.send_response(status)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return None
            if status == 200 and name in (hub.stall, hub.broken):
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                if name == hub.broken:
                    hub.broken, self.close_connection = None, True
                    return None
                hub.stalled.set()
                hub.go_on.wait(300)
                body = body[len(body) // 2 :]
            try:
                self.wfile.write(body)
            except OSError:
                self.close_connection = True  # the client was killed
            return None

        def refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_json(self, document: object) -> None:
            content = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
