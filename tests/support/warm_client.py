"""``python -I -S warm_client.py ADDRESS ...``: what a launcher starts in place of ``python ...``.

It has the server of ``warm_python.py`` fork the process with the variables and streams that the
launcher gave, hands on the signals that it gets and ends as that process ends. Without
site-packages it is there in a hundredth of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence


def ask(
    address: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    streams: Sequence[int] = (0, 1, 2),
    terminal: bool = False,
) -> socket.socket:
    """Ask the server for a process; it answers with its id and, at its end, its exit code."""
    request = {
        "arguments": list(arguments),
        "env": dict(env),
        "cwd": os.getcwd(),
        "terminal": terminal,
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [b"\n"], list(streams))
    connection.sendall(json.dumps(request).encode() + b"\n")
    return connection


def main(address: str, arguments: list[str]) -> None:
    answers = ask(address, arguments, os.environ).makefile("r")
    process = int(answers.readline())

    def hand_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    code = int(answers.readline())
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other way
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
