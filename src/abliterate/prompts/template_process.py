"""Chat templates, rendered in a process of their own within bounds of time, memory and length.

The text is exactly what the tokenizer's ``apply_chat_template`` gives: the library's own function
renders it there (:mod:`abliterate.prompts.template_worker`). One process serves all templates; it
starts on the first use, or sooner by :func:`start_rendering`, and takes many conversations at a
time.
"""

from __future__ import annotations

import atexit
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, Queue
from threading import Lock, Thread
from typing import Any

from abliterate.errors import CheckpointError
from abliterate.prompts import template_worker

#: Seconds that a conversation may take, and all of them in turn; each adds a few to the latter.
SECONDS, MORE_SECONDS = 10.0, 0.1
#: Characters of a rendered conversation, and of all in one call; beyond these, so many times those
#: that went in.
LONGEST, MOST, TIMES = 1 << 20, 1 << 24, 4
_START_SECONDS = 120.0
_GRACE = 10.0  # seconds beyond all, after which the worker itself stops
_SHOWN = 300
_TICK = 0.25  # between looks at a process that has not answered
_MEMORY = template_worker.MEMORY + (512 << 20)
# Longer than the longest reply that the worker may give.
_LINE = 1 << 28

Conversation = Sequence[Mapping[str, Any]]


class TemplateError(Exception):
    """The template itself, or the library, refuses a conversation."""


class TemplateLimitError(CheckpointError):
    """A template passes the bounds of time, memory or length."""


def render_conversations(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any],
    date: str | None = None,
) -> list[str]:
    """What ``tokenizer.apply_chat_template(..., tokenize=False)`` gives for each conversation.

    Args:
        tokenizer: its template and special tokens count.
        conversations: messages, each with its role and content.
        add_generation_prompt: end with what the assistant's answer starts after.
        template_kwargs: further variables and arguments, as ``apply_chat_template`` takes them.
        date: the day, as ``YYYY-MM-DD``, that a template is told that asks for one, also as its
            ``date_string``; None for the machine's. Code that a tokenizer brings asks the machine.

    Raises:
        TemplateError: the template fails.
        TemplateLimitError: it takes too long, or too much memory, or writes too much.
    """
    options = {"add_generation_prompt": add_generation_prompt, **template_kwargs}
    if _has_own_code(tokenizer):
        # Code of a library or of a checkpoint that was trusted, instead of a template.
        try:
            return [
                str(tokenizer.apply_chat_template(list(each), tokenize=False, **options))
                for each in conversations
            ]
        except Exception as error:  # whatever that code raises
            raise TemplateError(_short(str(error), type(error).__name__)) from None
    try:
        request = _request(tokenizer, options) | {"date": date}
        messages = [_messages(each) for each in conversations]
        body = json.dumps(request | {"conversations": messages}, default=_placeholder)
    except Exception as error:  # arguments that contradict each other, a template that is not there
        raise TemplateError(_short(str(error), type(error).__name__)) from None
    return [str(text) for text in _run(tokenizer, body, len(messages), "text")]


def template_names(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> frozenset[str] | None:
    """The variables that the template reads, or None where that is not known.

    Those that every template gets (``messages``, ``tools``, special tokens, ...) are among them.

    Raises:
        TemplateLimitError: the template takes too long to read, or too much memory.
    """
    if _has_own_code(tokenizer):
        return None
    try:
        request = _request(tokenizer, template_kwargs)
        body = json.dumps({"template": request["template"], "conversations": None})
        return frozenset(*_run(tokenizer, body, 1, "names"))
    except TemplateLimitError:
        raise
    except Exception:  # it does not compile, which rendering tells better
        return None


def template_text(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> str:
    """The template that renders, of several the chosen one; of a tokenizer with code, its name."""
    if _has_own_code(tokenizer):
        return f"{type(tokenizer).__name__} {getattr(tokenizer, 'chat_template', None)}"
    return str(_request(tokenizer, template_kwargs)["template"])


def _has_own_code(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerBase

    plain = PreTrainedTokenizerBase.apply_chat_template
    return getattr(type(tokenizer), "apply_chat_template", None) is not plain


def _run(tokenizer: Any, body: str, count: int, wanted: str) -> list[Any]:
    try:
        return _rendering.run(body, count, wanted)
    except TemplateLimitError as error:
        raise TemplateLimitError(
            f"the chat template of {tokenizer.name_or_path} {error}: give the checkpoint another "
            "chat_template.jinja, or --template FILE"
        ) from None


def start_rendering() -> None:
    """Begin to start the process, so that it is ready once it is needed."""
    _rendering.start()


def _request(tokenizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the conversations, as ``apply_chat_template`` itself would pass it on."""
    from transformers import PreTrainedTokenizerBase

    plain = PreTrainedTokenizerBase.apply_chat_template
    bound = inspect.signature(plain).bind(tokenizer, [], tokenize=False, **options).arguments
    for name in ("sanitize_control_tokens", "return_assistant_tokens_mask"):
        if bound.get(name):
            raise ValueError(f"{name} cannot be used here")
    tools = bound.get("tools")
    if tools is not None:
        from transformers.utils import get_json_schema

        tools = [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools]
    return {
        "template": tokenizer.get_chat_template(bound.get("chat_template"), tools),
        "variables": {**tokenizer.special_tokens_map, **bound.get("kwargs", {})},
        "named": {
            "tools": tools,
            "documents": bound.get("documents"),
            "add_generation_prompt": bound.get("add_generation_prompt", False),
            "continue_final_message": bound.get("continue_final_message", False),
        },
    }


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    if not conversation:
        raise ValueError("a conversation needs a message")
    return [{k: v for k, v in each.items() if v is not None} for each in conversation]


def _placeholder(value: Any) -> str:
    """What the library shows a template of a value that is no plain data."""
    return f"<{type(value).__name__}>"


def _short(message: str, kind: str) -> str:
    return " ".join(message.split())[:_SHOWN] or kind


class _Worker:
    """A process that renders, and the thread that reads what it writes."""

    def __init__(self) -> None:
        import transformers

        self._process = subprocess.Popen(
            [sys.executable, "-I", template_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
            text=True,
            encoding="utf-8",
        )
        self._replies: Queue[str] = Queue()
        self.ready = False
        self.credit = SECONDS
        Thread(target=self._read, name="chat-template", daemon=True).start()
        library = str(Path(next(iter(transformers.__path__))))
        self._send(json.dumps({"path": sys.path, "library": library}))

    def render(self, body: str, count: int, wanted: str) -> list[Any]:
        """Send a request and await so many replies; returns what each of them holds as wanted."""
        if not self.ready:
            self._wait(_START_SECONDS)
            self.ready = True
        self.credit += MORE_SECONDS * count
        bounds = {"longest": LONGEST, "most": MOST, "times": TIMES, "seconds": self.credit + _GRACE}
        self._send(json.dumps(bounds)[:-1] + ", " + body[1:])
        found: list[Any] = []
        while len(found) < count:
            seconds = min(SECONDS, self.credit)
            reply, left = self._wait(seconds)
            self.credit -= seconds - left
            if "limit" in reply:
                raise TemplateLimitError(str(reply["limit"]))
            if wanted not in reply:
                raise TemplateError(_short(reply["message"], reply["error"]))
            found.append(reply[wanted])
        return found

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:  # it is gone, which the wait for its answer finds
            return

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            while line := self._process.stdout.readline(_LINE):
                self._replies.put(line)
        except (OSError, ValueError):
            pass
        self._replies.put("")

    def _wait(self, seconds: float) -> tuple[dict[str, Any], float]:
        """The next reply, and what is left of the seconds.

        They are counted in short waits: time in which this process was stopped is none of theirs.
        """
        while True:
            begun = time.monotonic()
            try:
                line = self._replies.get(timeout=max(0.0, min(_TICK, seconds)))
            except Empty:
                seconds -= _TICK
                if seconds <= 0:
                    raise self._failure(f"does not end within {SECONDS:g} seconds") from None
                if self._too_large():
                    raise self._failure("takes too much memory") from None
                continue
            if not line.endswith("\n"):
                raise self._failure("ends the process that renders it")
            reply: dict[str, Any] = json.loads(line)
            return reply, seconds - min(_TICK, time.monotonic() - begun)

    def _failure(self, what: str) -> TemplateLimitError:
        if self.ready:
            return TemplateLimitError(what)
        return TemplateLimitError(f"cannot be rendered ({sys.executable} does not start)")

    def _too_large(self) -> bool:
        import psutil

        try:
            return bool(psutil.Process(self._process.pid).memory_info().rss > _MEMORY)
        except psutil.Error:
            return False

    def close(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except (OSError, ValueError):
                    continue
        self._process.wait()


class _Rendering:
    """The worker of this process, started when it is needed and again after it was ended."""

    def __init__(self) -> None:
        self._worker: _Worker | None = None
        self._owner = 0
        self._lock = Lock()

    def start(self) -> None:
        with self._lock:
            self._get()

    def run(self, body: str, count: int, wanted: str) -> list[Any]:
        with self._lock:
            worker, done = self._get(), False
            try:
                found = worker.render(body, count, wanted)
                done = True
                return found
            except TemplateError:
                done = True  # it said so itself, and waits for the next request
                raise
            finally:
                if not done:
                    self.close()

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None and self._owner == os.getpid():
            worker.close()

    def _get(self) -> _Worker:
        if self._worker is None or self._owner != os.getpid():  # not one inherited by a fork
            self._worker, self._owner = _Worker(), os.getpid()
        return self._worker


_rendering = _Rendering()
atexit.register(_rendering.close)
