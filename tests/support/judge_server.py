"""An OpenAI-compatible endpoint on loopback, for tests: answers, or fails, as it is told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

# What a rule returns: a verdict's text, or (status, headers, body) as they are, or None: no answer,
# or what writes the raw reply to the socket, a piece at a time.
Reply = str | tuple[int, dict[str, str], str] | Callable[[BinaryIO], None] | None


@dataclass
class Endpoint:
    """A running server.

    Attributes:
        url: its base URL.
        requests: bodies that arrived, each with the key it was sent with.
        rule: what to answer to a body.
        models: names that it lists; None: it lists none, and says 404.
    """

    rule: Callable[[dict[str, Any]], Reply]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    models: list[str] | None = None
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def endpoint(rule: Callable[[dict[str, Any]], Reply]) -> Iterator[Endpoint]:
    """Serve ``rule`` on a free port until the context ends."""
    state = Endpoint(rule)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with state.lock:
                state.requests.append({"path": self.path})
            if state.models is None or not self.path.endswith("/models"):
                self.send_error(404)
                return
            listed = [{"id": m, "object": "model", "created": 0, "owned_by": "x"}
                      for m in state.models]  # fmt: skip
            payload = json.dumps({"object": "list", "data": listed}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(body | {"path": self.path})
                state.keys.append(self.headers.get("Authorization"))
                reply = state.rule(body)
            if reply is None:  # never: until the test is over
                state.closing.wait()
                return
            if callable(reply):
                with suppress(OSError):  # the client may have gone
                    reply(self.wfile)
                self.close_connection = True
                return
            if isinstance(reply, str):
                choice = {"index": 0, "message": {"role": "assistant", "content": reply},
                          "finish_reason": "stop"}  # fmt: skip
                document = {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                            "choices": [choice]}  # fmt: skip
                reply = (200, {"Content-Type": "application/json"}, json.dumps(document))
            status, headers, text = reply
            payload = text.encode()
            try:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)
            except OSError:
                pass  # the client has gone

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def nobody() -> Iterator[str]:
    """The base URL of a port that is taken but where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
