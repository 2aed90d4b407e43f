"""The process in which chat templates run: conversations in, text out, a line of JSON each.

A chat template is a program that a stranger wrote. Jinja's sandbox keeps it from files and names,
but not from looping for ever or from asking for all memory, and no thread of the same process can
stop it while it does. So it runs here, where :mod:`abliterate.prompts.template_process` can.

This file is run by its path: it imports nothing of the package, and of ``transformers`` the one
module that renders templates, without the package around it, which takes seconds.
"""

from __future__ import annotations

import datetime
import json
import signal
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, TextIO

#: What rendering may take beyond what the process has at its start.
MEMORY = 1 << 30
#: How templates ask for the date: by the library's function, or by a variable such as Llama 3.1's.
CLOCK, DATE_STRING, DATE_FORMAT = "strftime_now", "date_string", "%d %b %Y"
_SHOWN = 2000


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer requests until there are no more; the first line says where the libraries lie."""
    begin = json.loads(requests.readline())
    sys.path[:] = begin["path"]
    datetime.datetime = _Clock  # type: ignore[misc]  # before the library takes it from there
    renderer = find_renderer(begin["library"])
    render = renderer.render_jinja_template
    _limit_memory()
    _write(replies, {"ready": True})
    for line in requests:
        request = json.loads(line)
        _arm(request["seconds"])
        if request["conversations"] is None:
            _write(replies, _names(renderer, request["template"]))
            _arm(0)
            continue
        _tell_date(renderer, request)
        room = request["most"] + request["times"] * len(line)
        for conversation in request["conversations"]:
            own = len(json.dumps(conversation)) + len(request["template"])
            longest = request["longest"] + request["times"] * own
            reply = _answer(render, request, conversation, min(longest, room))
            _write(replies, reply)
            if "text" not in reply:
                break
            room -= len(reply["text"])
        _arm(0)


class _Clock(datetime.datetime):
    """The date that templates are told, at midnight; the machine's own where none is given."""

    told: datetime.date | None = None

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _Clock:
        if cls.told is None:
            return super().now(tz)
        return cls(cls.told.year, cls.told.month, cls.told.day, tzinfo=tz)

    @classmethod
    def today(cls) -> _Clock:
        return cls.now()

    @classmethod
    def utcnow(cls) -> _Clock:
        return cls.now()


def _tell_date(renderer: ModuleType, request: Mapping[str, Any]) -> None:
    """Set the clock to the request's date, and ``date_string``, where the template reads it."""
    _Clock.told = date = request["date"] and datetime.date.fromisoformat(request["date"])
    if date is None or DATE_STRING in request["variables"]:
        return
    if DATE_STRING in _names(renderer, request["template"]).get("names", ()):
        request["variables"][DATE_STRING] = date.strftime(DATE_FORMAT)


@lru_cache(maxsize=8)
def _names(renderer: ModuleType, template: str) -> dict[str, Any]:
    """The variables that a template reads from outside, and the clock if it reads that.

    Functions that the library gives to every template are not among them.
    """
    from jinja2 import meta, nodes

    try:
        parsed = renderer._compile_jinja_template(template).environment.parse(template)
        found = meta.find_undeclared_variables(parsed)
        found |= {CLOCK} & {name.name for name in parsed.find_all(nodes.Name)}
    except MemoryError:
        return {"limit": "takes too much memory"}
    except BaseException as error:
        return {"error": type(error).__name__, "message": str(error)[:_SHOWN]}
    return {"names": sorted(found)}


def find_renderer(library: str) -> ModuleType:
    """The library's own module with ``render_jinja_template``.

    Args:
        library: the folder of the ``transformers`` package.
    """
    try:
        for name in ("transformers", "transformers.utils"):
            package = ModuleType(name)
            package.__path__ = ["/".join([library, *name.split(".")[1:]])]
            sys.modules[name] = package
        module = import_module("transformers.utils.chat_template_utils")
    except Exception:  # a version whose module needs the rest
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        module = import_module("transformers.utils.chat_template_utils")
    return module


def _answer(
    render: Callable[..., Any], request: Mapping[str, Any], conversation: Any, longest: int
) -> dict[str, Any]:
    try:
        rendered, _ = render(
            conversations=[conversation],
            chat_template=request["template"],
            **request["named"],
            **request["variables"],
        )
        text = rendered[0]
    except MemoryError:
        return {"limit": "takes too much memory"}
    except BaseException as error:  # jinja's errors and whatever the template itself raises
        line = getattr(error, "lineno", None)  # of errors in its syntax
        place = "" if line is None else f" in line {line}"
        return {"error": type(error).__name__, "message": f"{str(error)[:_SHOWN]}{place}"}
    if len(text) > longest:
        return {"limit": f"writes {len(text):,} characters, for which {longest:,} are allowed"}
    return {"text": text}


def _limit_memory() -> None:
    """Where the system can: else the other side watches what this process takes."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ImportError, OSError, ValueError):
        return


def _arm(seconds: float) -> None:
    """The system ends this process after so long, should the other side be gone by then."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _write(replies: TextIO, reply: Mapping[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other side ends it
    out, sys.stdout = sys.stdout, sys.stderr
    serve(sys.stdin, out)
