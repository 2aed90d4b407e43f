"""score: completions made elsewhere, without a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from abliterate.console import progress_bar
from abliterate.errors import InputError, InterruptedWorkError, UsageError
from abliterate.evaluation.classifier import classified, find_classifier
from abliterate.evaluation.completion import (
    Completion,
    scored,
    told_in,
)
from abliterate.evaluation.completion_rates import scores
from abliterate.evaluation.completions import (
    is_completions,
    keep_verdicts,
    read_lines,
)
from abliterate.evaluation.judge_completions import judged, warn
from abliterate.evaluation.judges import Judge, Verdict, find_judge
from abliterate.evaluation.raters import agreements
from abliterate.metrics.answer_flaws import flaw_thresholds
from abliterate.metrics.intervals import share_methods
from abliterate.metrics.refusal_phrases import ALL, RefusalPhrases, parse_phrases
from abliterate.prompts.columns import CATEGORY_COLUMNS, well_formed
from abliterate.prompts.row_files import read_rows
from abliterate.prompts.sources import Prompt
from abliterate.settings import Settings
from abliterate.storage.artifacts import check_writable, hash_json, versions, write_atomically
from abliterate.storage.guarded_files import naming, open_to_extend
from abliterate.storage.locks import hold_file
from abliterate.storage.ownership import claim_file

# Lines with a verdict, by prompt and response.
Held = Mapping[tuple[str, str], Mapping[str, Any]]


def score_file(file: Path, settings: Settings, out: Path | None = None) -> dict[str, Any]:
    """Refusal and, with a judge, safety scores of a file of completions.

    Args:
        file: JSON list or JSONL of objects with ``prompt``, ``response`` and optional ``category``.
        settings: which judge and classifier, if any.
        out: JSONL file for each completion with its scores. Verdicts of the same judge that it
            holds already are kept, so that only missing ones are asked for; without a judge all
            are kept. Those that no longer belong there go into a copy beside it.

    Raises:
        InputError: the file is unusable, or another process writes ``out``.
        UsageError: the judge's options or the output are wrong.
    """
    phrases = parse_phrases(settings.evaluate.refusal_phrases, settings.evaluate.refusal_phrase)
    completions = read_completions(file, phrases)
    judge, classifier = find_judge(settings), find_classifier(settings)
    if out is not None:
        if out.is_dir():
            raise UsageError(f"output {out} is a folder: name a file")
        if out.exists() and out.samefile(file):
            raise UsageError(f"output {out} is the input: name another file")
        check_writable(out.parent)
    with nullcontext() if out is None else hold_file(out, "score"):
        if out is not None:
            claim_file(out, is_completions, "score -o")
        if classifier is not None:
            completions = classified(classifier, completions, read_lines(out) if out else ())
        if judge is not None:
            completions = _judge(judge, completions, out)
        elif out is not None:
            held = _verdicts(out)
            _keep_unlisted(out, held, completions)
            _write(out, completions, None, held)
    return {
        "file": str(file),
        "scores": scores(completions),
        "completions": [
            {"index": index}
            | {k: v for k, v in c.record().items() if k not in ("prompt", "response", "judge")}
            for index, c in enumerate(completions)
        ],
        "refusal_phrases": phrases.summary(),
        "broken_answers": flaw_thresholds(),
        "refused_at_unit": "words",
        "judge": judge and judge.summary(),
        "classifier": classifier and classifier.summary(),
        "judge_failures": [
            {"index": index, "error": c.judge_error}
            for index, c in enumerate(completions)
            if c.judge_error is not None
        ],
        "agreement": agreements(completions, settings.model.seed),
        "intervals": share_methods(),
        "versions": versions(),
    }


def read_completions(file: Path, phrases: RefusalPhrases = ALL) -> list[Completion]:
    """The completions of a JSON or JSONL file, scored by ``phrases``.

    Raises:
        InputError: it is missing, damaged or empty, or an entry lacks its prompt or response.
    """
    if file.suffix.lower() not in (".json", ".jsonl"):
        raise InputError(f"{file}: give a .json list or a .jsonl file of completions")
    completions = []
    for number, row in enumerate(read_rows(file, "completions file"), 1):
        if not isinstance(row, dict):
            raise InputError(f"{file}, entry {number}: expected an object, not {row!r:.40}")
        prompt, response = (_text(row, key, file, number) for key in ("prompt", "response"))
        named = next((row[key] for key in CATEGORY_COLUMNS if row.get(key) is not None), None)
        category = None if named is None else well_formed(str(named), f"{file}, entry {number}")
        completions.append(scored(Prompt(prompt, category), response, phrases, told_in(row)))
    if not completions:
        raise InputError(f"{file} holds no completions")
    return completions


def _text(row: dict[str, Any], key: str, file: Path, number: int) -> str:
    text = row.get(key)
    if not isinstance(text, str):
        raise InputError(f"{file}, entry {number}: no text under '{key}'")
    return well_formed(text, f"{file}, entry {number}")


def _judge(judge: Judge, completions: list[Completion], out: Path | None) -> list[Completion]:
    key = hash_json(judge.summary())
    held = {} if out is None else _verdicts(out)
    known = {
        said: Verdict(line["safe"], line.get("judge"))
        for said, line in held.items()
        if line.get("judged_by") == key
    }
    if out is not None:
        _keep_unlisted(out, held, completions, key)
    rated = [
        judged(c, known[c.prompt, c.response]) if (c.prompt, c.response) in known else c
        for c in completions
    ]
    # A thought that has not ended is no answer that could be judged.
    todo = [index for index, c in enumerate(rated) if c.safe is None and c.refused is not None]
    failed: Counter[str] = Counter()
    with progress_bar("judge", len(todo)) as bar, ExitStack() as opened:
        file: BinaryIO | None = None
        if out is not None:
            _write(out, [c for c in rated if c.safe is not None], key)
            file = opened.enter_context(open_to_extend(out))

        def keep(place: int, verdict: Verdict) -> None:
            index = todo[place]
            rated[index] = judged(rated[index], verdict)
            if verdict.error:
                failed[verdict.error] += 1
            if out is not None and file is not None:  # at once: an interruption loses none
                with naming(out):
                    file.write(_line(rated[index], key))
                    file.flush()
            bar.update(1)

        try:
            judge.judge([(rated[index].prompt, rated[index].answer) for index in todo], keep)
        except KeyboardInterrupt:
            if out is None:
                raise
            raise InterruptedWorkError(
                f"interrupted: the verdicts so far are in {out}, and the same command goes on from "
                "there"
            ) from None
    if out is not None:
        _write(out, rated, key)
    warn(failed, len(todo))
    return rated


def _verdicts(out: Path) -> Held:
    lines = read_lines(out)
    return {
        (one["prompt"], one["response"]): one for one in lines if isinstance(one.get("safe"), bool)
    }


def _keep_unlisted(
    out: Path, held: Held, completions: Sequence[Completion], key: str | None = None
) -> None:
    """Copy ``out`` if it holds verdicts on other completions, or of another judge than ``key``."""
    asked = {(c.prompt, c.response) for c in completions}
    if any(said not in asked or key not in (None, one.get("judged_by"))
           for said, one in held.items()):  # fmt: skip
        keep_verdicts(out)


def _write(
    out: Path, completions: Sequence[Completion], key: str | None, held: Held | None = None
) -> None:
    """Write the lines; ``held`` are verdicts to keep on completions that have none."""
    lines = (_line(c, key, (held or {}).get((c.prompt, c.response))) for c in completions)
    write_atomically(out, b"".join(lines))


def _line(completion: Completion, key: str | None, held: Mapping[str, Any] | None = None) -> bytes:
    line = completion.record()
    if completion.safe is not None and key is not None:
        line["judged_by"] = key
    if completion.safe is None and held is not None:
        line |= {name: held[name] for name in ("safe", "judge", "judged_by") if name in held}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"
