"""The command line on a stand-in for Windows: ``python without_posix.py ROOT``, commands on stdin.

Before anything is imported this takes away what Windows lacks (modules, functions and flags), and
below ROOT it lets files be as there: no folder is opened, nothing that is open is removed or
renamed, no name is taken by a rename, and what is opened by number is opened in binary mode. It is
no Windows: paths, line ends, locks that bind and the console's encoding stay this system's.

Each line of stdin is the list of a command's arguments; each line of stdout its exit code, what it
wrote to stdout and what to stderr.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

MODULES = ("fcntl", "resource", "readline", "termios", "pwd", "grp")
FUNCTIONS = (
    *("preadv", "pread", "pwritev", "pwrite", "readv", "writev", "copy_file_range", "sendfile"),
    *("splice", "memfd_create", "posix_fadvise", "posix_fallocate", "statvfs", "fstatvfs"),
    *("sched_getaffinity", "fork", "forkpty", "killpg", "setsid", "mkfifo", "chown"),
)
FLAGS = ("DIRECT", "NOFOLLOW", "NONBLOCK", "DIRECTORY", "SYNC", "DSYNC", "NOATIME", "PATH")
SIGNALS = ("SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "setitimer", "alarm")
_BINARY = 1 << 30


def hide(root: Path) -> None:
    """Take it all away, for good."""
    import ctypes
    import mmap
    import shutil

    import psutil  # has a module of its own for each system, by its name

    assert psutil
    statvfs = os.statvfs

    def disk_usage(path: Any) -> Any:  # by other means there
        found = statvfs(path)
        unit = found.f_frsize
        total, free = found.f_blocks * unit, found.f_bavail * unit
        return shutil._ntuple_diskusage(total, total - free, free)  # type: ignore[attr-defined]

    shutil.disk_usage = disk_usage
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in (*FUNCTIONS, *(f"O_{flag}" for flag in FLAGS)):
        with contextlib.suppress(AttributeError):
            delattr(os, name)
    with contextlib.suppress(AttributeError):
        del mmap.MADV_DONTNEED  # type: ignore[attr-defined]
    os.O_BINARY = _BINARY  # type: ignore[attr-defined]
    _restrict_files(root)
    load = ctypes.CDLL.__init__

    def no_library_of_the_process(self: Any, name: Any, *args: Any, **kwargs: Any) -> None:
        if name is None and str(sys._getframe(1).f_globals.get("__name__")).startswith(
            "abliterate"
        ):
            raise TypeError("argument of type 'NoneType' is not iterable")
        load(self, name, *args, **kwargs)

    ctypes.CDLL.__init__ = no_library_of_the_process  # type: ignore[method-assign]


def hide_signals() -> None:
    """The signals too: after torch, which asks for the system's name, is imported."""
    import signal
    import subprocess
    from types import SimpleNamespace

    from transformers import modeling_utils

    assert modeling_utils
    # The library's own needs them here to end a process, and other means there.
    subprocess.signal = SimpleNamespace(**vars(signal))  # type: ignore[attr-defined]
    for name in SIGNALS:
        with contextlib.suppress(AttributeError):
            delattr(signal, name)


def _restrict_files(root: Path) -> None:
    top = os.path.realpath(root)
    plain_open, plain_fsync = os.open, os.fsync

    def below(path: Any) -> str | None:
        if isinstance(path, int):
            return None
        place, name = os.path.split(os.path.abspath(os.fspath(path)))
        real = os.path.join(os.path.realpath(place), name)
        return real if real.startswith(f"{top}/") else None

    def is_open(path: str) -> bool:
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                held = os.readlink(f"/proc/self/fd/{number}")
                if held == path or held.startswith(f"{path}/"):
                    return True
        return False

    def denied(path: Any) -> PermissionError:
        return PermissionError(errno.EACCES, "Permission denied", str(path))

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if below(path) and os.path.isdir(path):
            raise denied(path)
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if caller.startswith("abliterate") and not flags & _BINARY:
            raise AssertionError(f"{caller} opens {path} in text mode")
        return plain_open(path, flags & ~_BINARY, *args, **kwargs)

    def fsync(descriptor: int) -> None:
        flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0]
        if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        plain_fsync(descriptor)

    def guarded(name: str, ends: int, replaces: bool) -> None:
        plain = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            for path in map(below, args[:ends]):
                if path and is_open(path):
                    raise denied(path)
            if ends == 2 and (target := below(args[1])) and os.path.lexists(target):
                if not replaces:
                    raise FileExistsError(errno.EEXIST, "File exists", str(args[1]))
                if os.path.isdir(target):
                    raise denied(target)
            return plain(*args, **kwargs)

        setattr(os, name, call)

    os.open, os.fsync = open_, fsync
    for name in ("unlink", "remove", "rmdir"):
        guarded(name, 1, False)
    guarded("rename", 2, False)
    guarded("replace", 2, True)


def _serve() -> None:
    hide(Path(sys.argv[1]))
    hide_signals()
    real, sys.stdout = sys.stdout, sys.stderr
    from abliterate.cli.app import main

    for line in sys.stdin:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: int | None = main(json.loads(line))
            except BaseException:
                code = None
                traceback.print_exc()
        answer = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        print(json.dumps(answer), file=real, flush=True)


if __name__ == "__main__":
    _serve()
