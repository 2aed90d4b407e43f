"""Kill the editor at random moments and resume it: ``python killing.py JOB.json``, JSON on stdout.

Run as a process of its own: it loads the libraries once and forks a child for each edit, which runs
the command line as a user would, and so is in mid-work within milliseconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from abliterate.cli.app import main
from abliterate.direction_loading import load_direction
from abliterate.editing import planning
from abliterate.editing.workspace import partial_of
from abliterate.models.loading import Checkpoint

torch.set_num_threads(1)
# tqdm's default lock is shared between forked processes: a child killed while it holds it would
# block all others for good. Its monitor is a thread that a fork must not meet.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())


def start(source: str, direction: str, out: Path, overwrite: bool) -> int:
    """Fork a child that runs the command; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        command = ["orthogonalize", source, "--direction", direction, "-o", str(out), "-q"]
        code = main([*command, *(["--overwrite"] if overwrite else [])])
    finally:
        os._exit(code)


def wait_and_kill(child: int, partial: Path, seconds: float, generator: random.Random) -> None:
    """SIGKILL at a random moment: of the whole run, or of the time in which it writes."""
    if generator.random() < 0.7:
        deadline = time.perf_counter() + 5
        while not partial.exists() and time.perf_counter() < deadline:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.0002)
        time.sleep(generator.uniform(0, 0.8 * seconds))
    else:
        time.sleep(generator.uniform(0, 1.1 * seconds))
    os.kill(child, signal.SIGKILL)


def finish(child: int) -> int:
    """The child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(folder: Path) -> dict[str, bytes] | None:
    """Every file below a folder, or None if there is no such folder."""
    if not folder.exists():
        return None
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def torture(job: dict[str, Any]) -> dict[str, Any]:
    """Kill ``job["kills"]`` runs; each trial ends with one that is let go on to the end."""
    generator = random.Random(job["seed"])
    source, out = job["source"], Path(job["out"])
    partial = partial_of(out)
    files = list(job["directions"])
    directions = [load_direction(path) for path in files]
    # The plan is the same each time: made once, it leaves the time to what is tested here.
    checkpoint = Checkpoint(source, Path(source))
    plans = {d.sha256: planning.make_plan(checkpoint, d.vector) for d in directions}
    by_values = {tuple(d.vector.tolist()): plans[d.sha256] for d in directions}
    planning.make_plan = lambda _, vector, *more: by_values[tuple(vector.tolist())]  # type: ignore
    # Imports all there is to import.
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["orthogonalize", source, "--direction", files[0], "-o", str(out)]) == 0
    shutil.rmtree(out)
    old = tree(Path(job["old"])) if job["old"] else None
    references, seconds = [], 0.0
    for direction in files:
        begun = time.perf_counter()
        assert finish(start(source, direction, out, False)) == 0
        seconds = time.perf_counter() - begun
        references.append(tree(out))
        shutil.rmtree(out)
    kills = resumed = trials = 0
    errors: list[str] = []
    while kills < job["kills"]:
        trials += 1
        if old is not None:
            shutil.copytree(job["old"], out)
        while True:
            which = generator.randrange(len(references)) if generator.random() < 0.3 else 0
            child = start(source, files[which], out, old is not None)
            if generator.random() < 0.3 and kills:
                code = finish(child)
                break
            wait_and_kill(child, partial, seconds, generator)
            code = finish(child)
            if code != -signal.SIGKILL:
                break
            kills += 1
            journal = partial / "journal.jsonl"
            resumed += journal.exists() and journal.read_bytes().count(b'"shard"') > 0
            seen = tree(out)
            if seen is not None and seen not in (*references, old):
                errors.append(f"trial {trials}: OUT is incomplete after a kill")
            if seen in references and old is None:
                # Killed after the rename: the same call tidies up, or finds nothing left to do.
                which, left = references.index(seen), partial.exists()
                code = finish(start(source, files[which], out, False)) if left else 0
                break
        if code != 0 or tree(out) != references[which]:
            errors.append(f"trial {trials}: exit code {code}, or OUT differs from the reference")
        if partial.exists():
            errors.append(f"trial {trials}: OUT.partial is still there")
            shutil.rmtree(partial)
        shutil.rmtree(out, ignore_errors=True)
    return {
        "kills": kills,
        "trials": trials,
        "resumed": resumed,
        "errors": errors,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(torture(json.loads(sys.argv[1]))))
