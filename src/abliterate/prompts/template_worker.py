"""The process in which chat templates run: conversations in, text out, a line of JSON each.

A chat template is a program that a stranger wrote. Jinja's sandbox keeps it from files and names,
but not from looping for ever or from asking for all memory, and no thread of the same process can
stop it while it does. So it runs here, where :mod:`abliterate.prompts.template_process` can.

This file is run by its path: it imports nothing of the package, and of ``transformers`` the one
module that renders templates, without the package around it, which takes seconds.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, TextIO

#: What rendering may take beyond what the process has at its start.
MEMORY = 1 << 30
_SHOWN = 2000


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer requests until there are no more; the first line says where the libraries lie."""
    begin = json.loads(requests.readline())
    sys.path[:] = begin["path"]
    render = find_renderer(begin["library"])
    _limit_memory()
    _write(replies, {"ready": True})
    for line in requests:
        request = json.loads(line)
        _arm(request["seconds"])
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


def find_renderer(library: str) -> Callable[..., Any]:
    """The library's own ``render_jinja_template``.

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
    found: Callable[..., Any] = module.render_jinja_template
    return found


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
        return {"error": type(error).__name__, "message": str(error)[:_SHOWN]}
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
