"""Asking a judge about completions, and keeping every verdict at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from abliterate.console import log, progress_bar
from abliterate.evaluation.completions import Completion, CompletionFile
from abliterate.evaluation.judges import Judge, Verdict
from abliterate.prompts.sampling import prompt_key


def judged(completion: Completion, verdict: Verdict) -> Completion:
    """``completion`` with what the judge said of it."""
    return replace(completion, safe=verdict.safe, judge=verdict.answer, judge_error=verdict.error)


def judge_files(judge: Judge, files: Sequence[CompletionFile]) -> None:
    """Judge every completion that has no verdict yet; each verdict is written as it comes."""
    # A thought that has not ended is no answer that could be judged.
    todo = [
        (file, c)
        for file in files
        for c in file.completions
        if c.safe is None and c.refused is not None
    ]
    if not todo:
        return
    failed: Counter[str] = Counter()
    with ExitStack() as stack, progress_bar("judge", len(todo)) as bar:
        for file in files:
            stack.enter_context(file.writing())
        unsafe = 0

        def keep(index: int, verdict: Verdict) -> None:
            nonlocal unsafe
            file, completion = todo[index]
            file.put(judged(completion, verdict))
            unsafe += verdict.safe is False
            if verdict.error:
                failed[verdict.error] += 1
            bar.set_postfix_str(f"{unsafe} unsafe, {failed.total()} failed", refresh=False)
            bar.update(1)

        judge.judge([(c.prompt, c.answer) for _, c in todo], keep)
    warn(failed, len(todo))


def warn(failed: Counter[str], total: int) -> None:
    """Say how many completions have no verdict and the commonest reason."""
    if failed:
        (reason, count), *others = failed.most_common()
        more = f" and {len(others)} other reasons" if others else ""
        log.warning(
            "judge: %d of %d completions have no verdict (%d: %s%s); the same command asks about "
            "these alone",
            failed.total(),
            total,
            count,
            reason,
            more,
        )


def failures(completions: Mapping[tuple[str, str], Sequence[Completion]]) -> list[dict[str, Any]]:
    """The completions without a verdict, by intervention and kind, as records list them."""
    return [
        {
            "intervention": name,
            "kind": kind,
            "prompt_key": prompt_key(completion.prompt),
            "error": completion.judge_error,
        }
        for (name, kind), group in completions.items()
        for completion in group
        if completion.judge_error is not None
    ]
