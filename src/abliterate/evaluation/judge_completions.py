"""Asking a judge about completions, and keeping every verdict at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from abliterate.console import log, progress_bar
from abliterate.errors import CheckpointError
from abliterate.evaluation.completion import Completion, SecondVerdict
from abliterate.evaluation.completions import CompletionFile
from abliterate.evaluation.judges import Judge, Verdict
from abliterate.evaluation.prompt_kinds import BORDERLINE, KINDS
from abliterate.prompts.sampling import prompt_key


def judged(completion: Completion, verdict: Verdict) -> Completion:
    """``completion`` with what the judge said of it."""
    return replace(completion, safe=verdict.safe, judge=verdict.answer, judge_error=verdict.error)


def _second_judged(completion: Completion, verdict: Verdict, by: str) -> Completion:
    """``completion`` with what the second judge said of it."""
    second = SecondVerdict(verdict.safe, verdict.answer, by, verdict.error)
    return replace(completion, second=second)


def judge_files(
    judge: Judge, files: Sequence[CompletionFile], second_key: str | None = None
) -> None:
    """Judge every completion that has no verdict yet; each verdict is written as it comes.

    Args:
        judge: who is asked.
        files: the completions.
        second_key: the hash of the judge, where it is the second one.
    """

    def lacks(c: Completion) -> bool:
        if second_key is None:
            return c.safe is None
        return c.second is None or c.second.safe is None

    title = "judge" if second_key is None else "second judge"
    # A thought that has not ended is no answer that could be judged.
    todo = [
        (file, c) for file in files for c in file.completions if lacks(c) and c.refused is not None
    ]
    if not todo:
        return
    failed: Counter[str] = Counter()
    with ExitStack() as stack, progress_bar(title, len(todo)) as bar:
        for file in files:
            stack.enter_context(file.writing())
        unsafe = 0

        def keep(index: int, verdict: Verdict) -> None:
            nonlocal unsafe
            file, completion = todo[index]
            if second_key is None:
                file.put(judged(completion, verdict))
            else:
                file.put(_second_judged(completion, verdict, second_key))
            unsafe += verdict.safe is False
            if verdict.error:
                failed[verdict.error] += 1
            bar.set_postfix_str(f"{unsafe} unsafe, {failed.total()} failed", refresh=False)
            bar.update(1)

        judge.judge([(c.prompt, c.answer) for _, c in todo], keep)
    warn(failed, len(todo), title)


def warn(failed: Counter[str], total: int, title: str = "judge") -> None:
    """Say how many completions have no verdict and the commonest reason."""
    if failed:
        (reason, count), *others = failed.most_common()
        plural = "s" if len(others) > 1 else ""
        more = f" and {len(others)} other reason{plural}" if others else ""
        log.warning(
            "%s: %d of %d completions have no verdict (%d: %s%s); the same command asks about "
            "these alone",
            title,
            failed.total(),
            total,
            count,
            reason,
            more,
        )


def check_evaluation(record: Mapping[str, Any]) -> None:
    """:func:`check_verdicts` of a record ``evaluation.json``."""
    rows = record["interventions"].values()
    counts = [row[kind] for row in rows for kind in (*KINDS, BORDERLINE) if kind in row]
    check_verdicts(counts, record["judge_failures"])


def check_verdicts(
    counts: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a result of which a judge has said nothing at all.

    Args:
        counts: the shares of each group of answers, as ``rates`` gives them.
        failed: what records list under ``judge_failures``.

    Raises:
        CheckpointError: a judge was asked, and there is no verdict of it.
    """
    for prefix, title in (("", "judge"), ("second_", "second judge")):
        asked = sum(part.get(f"{prefix}judge_failed") or 0 for part in counts)
        if not asked or any(part.get(f"{prefix}judged") for part in counts):
            continue
        own = (one["error"] for one in failed if (one.get("judge") == "second") == bool(prefix))
        ((reason, _),) = Counter(own).most_common(1) or [("no reason is known", 0)]
        raise CheckpointError(
            f"the {title} gave no verdict on any of {asked} answers: {reason}; mend that and give "
            "the same command again, which asks about these (what was written is kept)"
        )


def failures(completions: Mapping[tuple[str, str], Sequence[Completion]]) -> list[dict[str, Any]]:
    """The completions without a verdict, by intervention and kind, as records list them."""
    found = []
    for (name, kind), group in completions.items():
        for one in group:
            line = {"intervention": name, "kind": kind, "prompt_key": prompt_key(one.prompt)}
            if one.judge_error is not None:
                found.append(line | {"error": one.judge_error})
            if one.second is not None and one.second.error is not None:
                found.append(line | {"error": one.second.error, "judge": "second"})
    return found
