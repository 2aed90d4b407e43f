"""The few answers of a model hub that its client needs, over real HTTP on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from commands import Commands, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Branches:
    """A repository of several commits.

    Attributes:
        refs: commits by the names of branches and tags.
        commits: the folders of commits.
    """

    refs: dict[str, str]
    commits: dict[str, Path]


@dataclass
class Fault:
    """What is answered instead.

    Attributes:
        match: searched in method and path.
        status: of the answer.
        headers: of the answer.
        count: how many more times.
    """

    match: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    count: int = 1_000_000


@dataclass
class Hub:
    """A hub whose models are folders.

    Attributes:
        models: by their ids; each has one commit, ``COMMIT``.
        pushed: folders of the repositories that clients may write to, by id; each has one commit.
        private: of them, those that not everyone sees.
        account: whose token it is, as ``whoami`` answers; None: the token is no good.
        room: where folders of new repositories are made.
        stored: large files by the hash of their content, of whatever was sent.
        branches: repositories of several commits, by id; of data sets by ``datasets/`` and id.
        gated: ids whose files nobody gets.
        faults: answers that go wrong.
        paths: method and path of every request.
        announced: sizes that files are said to have, by name.
        cut: how many answers the client did not read to their end.
        url: where it answers.
        requests: method, file and range (or None) of each request for a file.
        stall: of this file only half is sent; then ``stalled`` is set, and ``go_on`` waited for.
        broken: of this file only half is sent, once, and the connection is closed.
        gone: parts of this file are given still, but not the whole.
        ranges: whether parts of a file can be asked for.
    """

    models: dict[str, Path] = field(default_factory=dict)
    pushed: dict[str, Path] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    account: dict | None = None
    stored: dict[str, bytes] = field(default_factory=dict)
    room: Path | None = None
    branches: dict[str, Branches] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    announced: dict[str, int] = field(default_factory=dict)
    cut: int = 0
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

    def clear(self) -> None:
        """Forget what was asked for, and be well again."""
        self.requests.clear()
        self.paths.clear()
        self.faults.clear()
        self.announced.clear()
        self.gated.clear()
        self.ranges, self.cut = True, 0

    def find(self, repo: str, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder of a revision, if there is one."""
        if repo in self.branches:
            held = self.branches[repo]
            commit = held.refs.get(revision, revision)
            return (commit, held.commits[commit]) if commit in held.commits else None
        if repo in self.pushed:
            return COMMIT, self.pushed[repo]
        known = repo in self.models and revision in ("main", COMMIT)
        return (COMMIT, self.models[repo]) if known else None

    def fault(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.count > 0 and re.search(fault.match, line):
                fault.count -= 1
                return fault
        return None


def _entries(folder: Path) -> list[tuple[str, int, str]]:
    """Path, size and hash of every file."""
    return [
        (path.relative_to(folder).as_posix(), len(content), hashlib.sha1(content).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for content in [path.read_bytes()]
    ]


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_PUT(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(length) if length else b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    self.body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            hub.paths.append(f"{self.command} {self.path}")
            if (fault := hub.fault(hub.paths[-1])) is not None:
                return self.send_empty(fault.status, fault.headers)
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts == ["api", "whoami-v2"]:
                return self.send_json(hub.account) if hub.account else self.send_empty(401, {})
            if self.command in ("POST", "PUT") and (written := self.write(parts)) is not None:
                return self.send_json(written)
            api = parts[:1] == ["api"]
            parts = parts[1:] if api else parts
            kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
            repo = "/".join(parts[:2] if kind == "models" else [kind, *parts[:2]])
            if api:
                return self.describe(repo, parts[2:])
            return self.file(repo, unquote(parts[3]), "/".join(parts[4:]))

        def write(self, parts: list[str]) -> object | None:
            """The answer to a client that writes; None if it does not."""
            if parts == ["api", "repos", "create"]:
                asked = json.loads(self.body)
                repo = f"{asked['organization'] or hub.account['name']}/{asked['name']}"
                assert hub.room is not None
                if repo not in hub.pushed:
                    hub.pushed[repo] = hub.room / repo
                    hub.pushed[repo].mkdir(parents=True)
                    (hub.pushed[repo] / ".gitattributes").write_text("")
                    if asked.get("visibility") == "private" or asked.get("private"):
                        hub.private.add(repo)
                return {"url": f"{hub.url}/{repo}"}
            if parts == ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            if parts[0] == "objects":
                hub.stored[parts[1]] = self.body
                return {}
            if parts[-2:] == ["objects", "batch"]:
                held = json.loads(self.body)["objects"]
                return {"transfer": "basic", "objects": [self.place(one) for one in held]}
            if parts[:2] != ["api", "models"] or "/".join(parts[2:4]) not in hub.pushed:
                return None
            if parts[4:5] == ["preupload"]:
                return {"files": [
                    {"path": f["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in json.loads(self.body)["files"]
                ]}  # fmt: skip
            if parts[4:5] == ["commit"]:
                repo = "/".join(parts[2:4])
                for line in map(json.loads, self.body.splitlines()):
                    self.commit(hub.pushed[repo], line["key"], line["value"])
                return {"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
            return None

        def place(self, wanted: dict) -> dict:
            """Where a large file goes; nowhere if it is there."""
            if wanted["oid"] in hub.stored:
                return wanted
            return {**wanted, "actions": {"upload": {"href": f"{hub.url}/objects/{wanted['oid']}"}}}

        def commit(self, folder: Path, key: str, value: dict) -> None:
            if key == "header":
                return
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if key == "lfsFile":
                path.write_bytes(hub.stored[value["oid"]])
            elif key == "file":
                path.write_bytes(b64decode(value["content"]))

        def describe(self, repo: str, rest: list[str]) -> None:
            if repo not in {**hub.models, **hub.branches, **hub.pushed}:
                return self.refuse("RepoNotFound")
            found = hub.find(repo, rest[1] if len(rest) > 1 else "main")
            if found is None:
                return self.refuse("RevisionNotFound")
            commit, folder = found
            entries = _entries(folder)
            listed = [{"type": "file", "path": n, "size": s, "oid": o} for n, s, o in entries]
            if rest[:1] == ["tree"]:
                return self.send_json(listed)
            if rest[:1] == ["paths-info"]:
                asked = parse_qs(self.body.decode()).get("paths", [])
                if self.body.startswith(b"{"):
                    asked = json.loads(self.body)["paths"]
                return self.send_json([entry for entry in listed if entry["path"] in asked])
            siblings = [
                {"rfilename": n, "size": hub.announced.get(n, s), "blobId": o}
                for n, s, o in entries
            ]
            name = repo.removeprefix("datasets/")
            seen = {"id": name, "sha": commit, "siblings": siblings}
            return self.send_json({**seen, "private": repo in hub.private})

        def file(self, repo: str, revision: str, name: str) -> None:
            found = hub.find(repo, revision)
            if found is None:
                return self.refuse("RevisionNotFound")
            commit, folder = found
            if repo in hub.gated:
                return self.send_empty(401, {"X-Error-Code": "GatedRepo"})
            path = folder / name
            whole = self.headers.get("Range") is None
            if not path.is_file() or (whole and name == hub.gone):
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
                return self.send_empty(404, headers)
            hub.requests.append((self.command, name, self.headers.get("Range")))
            content = path.read_bytes()
            first, last, status = 0, len(content) - 1, 200
            if hub.ranges and (wanted := self.headers.get("Range")):
                ends = wanted.removeprefix("bytes=").split("-")
                first, last, status = int(ends[0]), min(int(ends[1] or last), last), 206
            body = content[first : last + 1]
            self.send_response(status)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
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
                hub.cut += 1
                self.close_connection = True  # the client was killed, or has seen enough
            return None

        def refuse(self, code: str) -> None:
            self.send_empty(404, {"X-Error-Code": code})

        def send_empty(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
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


@contextmanager
def commands_beside_hub(cache: Path, *modules: str) -> Iterator[tuple[Hub, Commands]]:
    """A hub, and commands that know no other and keep what they fetch below ``cache``.

    Args:
        cache: a folder.
        modules: what the commands' server imports beforehand.
    """
    with hub_server() as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_DATASETS_CACHE": str(cache / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
        }
        with serving(environment, *modules) as run:
            yield hub, run
