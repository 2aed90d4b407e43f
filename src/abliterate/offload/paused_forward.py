"""Forward passes that stop and go on: each in a thread of its own, one running at a time.

A model's forward is one long function. To take many of them through block ``l`` before any sees
block ``l + 1``, each runs in its own thread up to where it calls a module that is not in memory,
and waits there. So all that lies between the blocks is the architecture's own code, whatever it
passes on from block to block. The threads never run at once: they are a way to leave a function and
to come back, not to compute in parallel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# The threads run little more than the code between blocks; their heavy work is done elsewhere.
_STACK = 2 << 20


class _Cancelled(BaseException):
    """Raised where a pass waits, to unwind it."""


@dataclass
class Request:
    """A call that a pass waits for."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(eq=False)
class Pass:
    """One forward pass.

    Attributes:
        run: the pass itself; it calls the model.
        request: the call that it waits for, None when it has ended.
        result: what ``run`` returned.
        steps: how many calls it has waited for.
    """

    run: Callable[[], Any]
    request: Request | None = None
    result: Any = None
    steps: int = 0
    _answer: Any = None
    _error: BaseException | None = None
    _cancelled: bool = False
    _go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Run up to the first call that has to wait; raises what the pass raises."""
        before = threading.stack_size(_STACK)
        try:
            self._thread = threading.Thread(target=self._main, daemon=True)
            self._thread.start()
        finally:
            threading.stack_size(before)
        self._wait()

    def answer(self, value: Any) -> None:
        """Return ``value`` from the call that it waits for, and run up to the next."""
        self.request, self._answer = None, value
        del value
        self._go.release()
        self._wait()

    def cancel(self) -> None:
        """Unwind it, wherever it is; returns when its thread has ended."""
        self._cancelled = True
        self._go.release()
        if self._thread is not None:
            self._thread.join()

    def wait_for(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called within the pass: hand the call over and wait for what it returns."""
        self.request = Request(module, args, kwargs)
        self.steps += 1
        # Whoever computes the call is to be the only one that holds its arguments.
        del args, kwargs
        self._back.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled
        answer, self._answer = self._answer, None
        return answer

    def _wait(self) -> None:
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def _main(self) -> None:
        _here.running = self
        # Of what lies between blocks; a pool of helpers for each thread would cost more.
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                self.result = self.run()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.request = None
            self._back.release()


class _Here(threading.local):
    running: Pass | None = None


_here = _Here()


def this_pass() -> Pass | None:
    """The pass whose thread this is, or None."""
    return _here.running
