"""Benchmarks through lm-eval: the model in memory, with hooks, or an edited checkpoint."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.console import bars_hidden, debugging
from abliterate.errors import InputError, UsageError, one_line
from abliterate.extras import import_extra
from abliterate.inference.decoding import plain_decoding
from abliterate.inference.engine import Change
from abliterate.inference.in_memory import engine_of
from abliterate.models.loading import LoadedModel

# For the standard errors of metrics that are no means.
_RESAMPLES = 1000
_PACKAGE = "the lm-eval package"


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows.

    Attributes:
        names: of tasks, groups or tags.
        manager: lm-eval's index of them.
        limit: examples per task, or None for all.
        version: of lm-eval.
    """

    names: tuple[str, ...]
    manager: Any
    limit: int | None
    version: str

    def summary(self) -> dict[str, Any]:
        """What results depend on."""
        return {"names": list(self.names), "limit": self.limit, "lm_eval": self.version}


def find_tasks(names: str, folder: Path | None = None, limit: int | None = None) -> Tasks:
    """Look tasks up before anything else is done for them.

    Args:
        names: with commas between them; patterns such as ``mmlu_*`` are allowed.
        folder: of further task definitions (YAML).
        limit: examples per task.

    Raises:
        UsageError: lm-eval is not installed, the folder is none, or it knows no such task.
    """
    lm_eval = import_extra("lm_eval", "--tasks", _PACKAGE, "eval")
    task_manager = import_extra("lm_eval.tasks", "--tasks", _PACKAGE, "eval").TaskManager
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tasks-dir {folder} is no folder")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UsageError("--tasks names no task")
    with _quiet():
        # The library's own index takes seconds: only where the folder does not have it all.
        manager = None
        if folder is not None:
            manager = task_manager(include_path=str(folder), include_defaults=False)
        if manager is None or not all(manager.match_tasks([name]) for name in wanted):
            manager = task_manager(include_path=None if folder is None else str(folder))
    names_found = []
    for name in wanted:
        matched = manager.match_tasks([name])
        if not matched:
            missing = "lm-eval has no" if folder is None else f"neither lm-eval nor {folder} has a"
            raise UsageError(f"--tasks: {missing} task '{name}' (`lm-eval ls tasks` lists them)")
        names_found += matched
    return Tasks(tuple(dict.fromkeys(names_found)), manager, limit, str(lm_eval.__version__))


def run_tasks(
    loaded: LoadedModel,
    tasks: Tasks,
    batch_size: int | str = "auto",
    seed: int = 0,
    change: Change = None,
) -> dict[str, dict[str, float]]:
    """Metrics of each task and group on a model under an intervention.

    Args:
        loaded: model and tokenizer.
        tasks: from :func:`find_tasks`.
        batch_size: requests per forward pass, or ``auto``.
        seed: of few-shot sampling.
        change: the intervention.

    Returns:
        lm-eval's figures by task, each under ``metric,filter`` or ``metric_stderr,filter``; under
        ``n`` how many examples they are of, where lm-eval says it.

    Raises:
        InputError: a task cannot be run, for want of its data set mostly.
        UsageError: the model's weights are not in memory.
    """
    with engine_of(loaded).in_memory("--tasks", change):
        results = _results(loaded, tasks, _rows(loaded, batch_size), seed)
    groups: Mapping[str, Any] = results.get("groups") or {}
    counts = results.get("n-samples") or {}
    return {
        name: _figures(figures, counts.get(name) or {})
        for name, figures in (results["results"] | groups).items()
    }


def _results(loaded: LoadedModel, tasks: Tasks, batch_size: int, seed: int) -> Any:
    """What lm-eval says of the model as it is now, hooks included."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        # A task that says nothing of its decoding is decoded greedily, as everything here is.
        with _quiet(), plain_decoding(loaded.model, keep_ends=True):
            model = HFLM(
                pretrained=loaded.model,
                tokenizer=loaded.tokenizer,
                batch_size=batch_size,
            )
            return simple_evaluate(
                model=model,
                tasks=list(tasks.names),
                task_manager=tasks.manager,
                limit=tasks.limit,
                log_samples=False,
                bootstrap_iters=_RESAMPLES,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:  # data sets, task definitions and models fail in many ways
        if debugging():
            raise
        reason = one_line(error)[:300] or type(error).__name__
        raise InputError(
            f"--tasks {','.join(tasks.names)}: lm-eval fails ({reason}); --debug shows more"
        ) from None


def _figures(entries: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among lm-eval's entries (aliases and ``N/A`` are text), and of how many."""
    figures = {
        key: float(value)
        for key, value in entries.items()
        if "," in key and isinstance(value, int | float) and not isinstance(value, bool)
    }
    count = entries.get("sample_len") or counts.get("effective")
    return figures | ({"n": count} if isinstance(count, int) and figures else {})


def _rows(loaded: LoadedModel, batch_size: int | str) -> int:
    if batch_size != "auto":
        return int(batch_size)
    return 8 if loaded.model.device.type == "cpu" else 32


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's logs and prints away from stdout, and its bars too where bars are hidden."""
    if debugging():
        with redirect_stdout(io.StringIO()):
            yield
        return
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()):
            if bars_hidden():
                with redirect_stderr(io.StringIO()):
                    yield
            else:
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
