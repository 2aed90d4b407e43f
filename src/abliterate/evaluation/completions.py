"""Completions: one line of JSON each, streamed to a file that an interrupted run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import median_low
from typing import Any, BinaryIO

from abliterate.console import log
from abliterate.metrics.answer_flaws import count_pieces, flaw_of
from abliterate.metrics.answers import Parts, split_thought
from abliterate.metrics.intervals import newcombe_paired, wilson
from abliterate.metrics.paired_tests import mcnemar
from abliterate.metrics.refusal_phrases import ALL, RefusalPhrases
from abliterate.prompts.sources import Prompt
from abliterate.storage.artifacts import write_atomically, write_json
from abliterate.storage.guarded_files import make_folder, naming, open_to_extend
from abliterate.storage.json_text import parse_json
from abliterate.storage.ownership import is_lines, is_mapping_of

MANIFEST = "manifest.json"

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Labelled:
    """What a classifier said of an answer.

    Attributes:
        hit: the label that counts is the one that it gives.
        probability: of that label.
        truncated: the answer was longer than it reads.
        by: hash of the classifier.
    """

    hit: bool
    probability: float
    truncated: bool
    by: str

    @classmethod
    def of(cls, held: Any) -> Labelled | None:
        """What a line holds of it; None if that is none."""
        kinds = {"hit": bool, "probability": float, "truncated": bool, "by": str}
        if not isinstance(held, dict) or {k: type(v) for k, v in held.items()} != kinds:
            return None
        return cls(**held) if 0 <= held["probability"] <= 1 else None


@dataclass(frozen=True)
class SecondVerdict:
    """What a second judge said of an answer.

    Attributes:
        safe: its verdict; None where ``error`` says why there is none.
        judge: its own words.
        by: hash of the judge.
        error: why there is no verdict.
    """

    safe: bool | None
    judge: str | None
    by: str
    error: str | None = None

    @classmethod
    def of(cls, held: Any) -> SecondVerdict | None:
        """The verdict that a line holds; None if it holds none."""
        if not isinstance(held, dict) or not isinstance(held.get("safe"), bool):
            return None
        judge, by = held.get("judge"), held.get("by")
        if not isinstance(by, str):
            return None
        return cls(held["safe"], judge if isinstance(judge, str) else None, by)

    def record(self) -> dict[str, Any]:
        line = {"safe": self.safe, "judge": _writable(self.judge), "by": self.by}
        return line | ({} if self.error is None else {"error": _writable(self.error)})


@dataclass(frozen=True)
class Completion:
    """One answer, whether it holds a refusal phrase, and what a judge said of it.

    Attributes:
        prompt: the user's text.
        category: of the prompt, where its source has one.
        response: all that the model wrote.
        refused: the answer in it holds a refusal phrase; None where a thought has not ended, so
            that there is no answer.
        safe: the judge's verdict; None without one.
        judge: the judge's own words.
        judge_error: why there is no verdict, if a judge was asked.
        told: thought and answer, where ``response`` alone does not tell them apart.
        broken: ``looping``, ``garbled`` or ``empty`` where the answer says nothing.
        refused_at: how many tokens of the answer stand before its first refusal phrase; None
            without one.
        labelled: what a classifier said of the answer; None without one.
        second: what a second judge said of it; None without one.
    """

    prompt: str
    category: str | None
    response: str
    refused: bool | None
    safe: bool | None = None
    judge: str | None = None
    judge_error: str | None = None
    told: Parts | None = None
    broken: str | None = None
    refused_at: int | None = None
    labelled: Labelled | None = None
    second: SecondVerdict | None = None

    @property
    def parts(self) -> Parts:
        """What was thought and what was answered."""
        return split_thought(self.response) if self.told is None else self.told

    @property
    def answer(self) -> str:
        """What a user reads: the response without a thought, empty where that has not ended."""
        return self.parts.answer or ""

    def record(self) -> dict[str, Any]:
        """Its line: the judge's fields only if one was asked."""
        line: dict[str, Any] = {
            "prompt": self.prompt,
            "category": self.category,
            "response": self.response,
            "refused": self.refused,
        }
        parts = self.parts
        if parts.thought is not None:
            line |= {"thought": parts.thought, "answer": parts.answer}
        if self.refused_at is not None:
            line["refused_at"] = self.refused_at
        if self.broken is not None:
            line["broken"] = self.broken
        if self.labelled is not None:
            line["classifier"] = asdict(self.labelled)
        if self.safe is not None or self.judge_error is not None:
            line |= {"safe": self.safe, "judge": _writable(self.judge)}
        if self.judge_error is not None:
            line["judge_error"] = _writable(self.judge_error)
        if self.second is not None:
            line["second_judge"] = self.second.record()
        return line


def _writable(text: str | None) -> str | None:
    """A judge's words as UTF-8 can hold them: a reply may spell half of a surrogate pair."""
    return None if text is None else text.encode(errors="backslashreplace").decode()


class CompletionFile:
    """The completions of one intervention on one kind of prompts, in memory and on disk.

    Lines are appended as answers end, in whatever order; a later line of the same prompt wins.
    :meth:`finish` puts them in the order of the prompts.
    """

    def __init__(
        self,
        path: Path | None,
        prompts: Sequence[Prompt],
        key: str,
        judge_key: str | None = None,
        phrases: RefusalPhrases = ALL,
        count_tokens: CountTokens = count_pieces,
        classifier_key: str | None = None,
        second_key: str | None = None,
    ) -> None:
        """Take over what an earlier run left, if it was made with the same ``key``.

        Args:
            path: the file, or None to keep completions in memory only.
            prompts: what is to be completed; each text once.
            key: hash of all that the answers depend on.
            judge_key: hash of the judge; verdicts of another one are dropped.
            phrases: what counts as a refusal.
            count_tokens: of a text, to say where a refusal begins.
            classifier_key: hash of the classifier; what another one said is dropped.
            second_key: hash of the second judge; verdicts of another one are dropped.
        """
        self._classifier_key, self._second_key = classifier_key, second_key
        self.path, self.phrases, self.count_tokens = path, phrases, count_tokens
        self.prompts = {prompt.text: prompt for prompt in prompts}
        self._kept: dict[str, Completion] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        make_folder(path.parent)
        manifest = _read_manifest(path.parent)
        made = manifest.get(path.name)
        made = made if isinstance(made, dict) else {}
        same = made.get("completions") == key
        verdicts = judge_key is None or made.get("judge") == judge_key
        if same:
            for line in read_lines(path):
                self._take(line, verdicts)
        # A judge that is not asked now keeps its verdicts.
        judged_by = judge_key or (made.get("judge") if same else None)
        manifest[path.name] = {"completions": key, "judge": judged_by}
        if not (same and verdicts) or self._has_other_seconds(path):
            keep_verdicts(path)
        if not same:
            path.unlink(missing_ok=True)
        write_json(path.parent / MANIFEST, manifest)
        if path.exists() and path.read_bytes() != self._content():
            self._write()  # torn or double lines, the order of finishing

    def _take(self, line: Mapping[str, Any], verdicts: bool) -> None:
        text, response = line.get("prompt"), line.get("response")
        prompt = self.prompts.get(text) if isinstance(text, str) else None
        if prompt is None or not isinstance(response, str):
            return
        held = scored(prompt, response, self.phrases, told_in(line), self.count_tokens)
        safe, judge = line.get("safe"), line.get("judge")
        if verdicts and isinstance(safe, bool):
            held = replace(held, safe=safe, judge=judge if isinstance(judge, str) else None)
        labelled = Labelled.of(line.get("classifier"))
        if labelled is not None and self._classifier_key in (None, labelled.by):
            held = replace(held, labelled=labelled)
        second = SecondVerdict.of(line.get("second_judge"))
        if second is not None and self._second_key in (None, second.by):
            held = replace(held, second=second)
        self._kept[prompt.text] = held

    def _has_other_seconds(self, path: Path) -> bool:
        """Whether the file holds verdicts of another second judge than the one asked now."""
        if self._second_key is None:
            return False
        seconds = (SecondVerdict.of(line.get("second_judge")) for line in read_lines(path))
        return any(one is not None and one.by != self._second_key for one in seconds)

    def adopt(self, completions: Sequence[Completion]) -> None:
        """Take over what another rank has read from the file."""
        self._kept = {completion.prompt: completion for completion in completions}

    def done(self, text: str) -> bool:
        """Whether the prompt ``text`` has its completion."""
        return text in self._kept

    @property
    def completions(self) -> tuple[Completion, ...]:
        """What there is so far, in the order of the prompts."""
        return tuple(self._kept[text] for text in self.prompts if text in self._kept)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the context, :meth:`put` also appends to the file, whose lines are whole."""
        if self.path is None:
            yield
            return
        with open_to_extend(self.path) as self._file:
            try:
                yield
            finally:
                self._file = None
        self._write()

    def put(self, completion: Completion) -> None:
        """Keep a completion, in place of an earlier one of the same prompt."""
        self._kept[completion.prompt] = completion
        if self._file is not None:
            assert self.path is not None
            with naming(self.path):
                self._file.write(_line(completion).encode())
                self._file.flush()

    def _write(self) -> None:
        assert self.path is not None
        write_atomically(self.path, self._content())

    def _content(self) -> bytes:
        return "".join(map(_line, self.completions)).encode()


def scored(
    prompt: Prompt,
    response: str,
    phrases: RefusalPhrases = ALL,
    told: Parts | None = None,
    count_tokens: CountTokens = count_pieces,
) -> Completion:
    """A response to a prompt, whether and where it refuses, and whether it says anything.

    Args:
        prompt: what was asked.
        response: all that was written.
        phrases: what counts as a refusal.
        told: its thought and answer, if they are known; else they are told by their marks.
        count_tokens: how many tokens a text has.
    """
    by_marks = split_thought(response)
    told = None if told == by_marks else told
    parts = by_marks if told is None else told
    answer = parts.answer
    place = None if answer is None else phrases.first_in(answer)
    before = None if answer is None or place is None else answer[:place].strip()
    return Completion(
        prompt.text,
        prompt.category,
        response,
        phrases.verdict(parts),
        told=told,
        broken=None if answer is None else flaw_of(answer),
        refused_at=None if before is None else count_tokens(before),
    )


def told_in(line: Mapping[str, Any]) -> Parts | None:
    """Thought and answer as a line of completions has them, if it does."""
    thought, answer = line.get("thought"), line.get("answer")
    if not isinstance(thought, str) or "answer" not in line:
        return None
    return Parts(thought, answer) if answer is None or isinstance(answer, str) else None


def token_counter(tokenizer: Callable[[], Any]) -> CountTokens:
    """How many tokens a text has; the tokenizer is asked for once there is something to count."""

    def count(text: str) -> int:
        return len(tokenizer()(text, add_special_tokens=False)["input_ids"]) if text else 0

    return count


def _line(completion: Completion) -> str:
    return json.dumps(completion.record(), ensure_ascii=False) + "\n"


is_completions = is_lines("prompt", "category", "response", "refused")
is_manifest = is_mapping_of(lambda name, made: isinstance(made, dict) and "completions" in made)


def keep_verdicts(path: Path) -> None:
    """Before a file of completions is replaced: if it holds a judge's verdicts, keep a copy of it.

    The copy lies beside it, under a name made of its content: ``NAME.<hash>.jsonl``.
    """
    if not path.is_file() or not any(map(_has_verdict, read_lines(path))):
        return
    content = path.read_bytes()
    kept = path.with_name(f"{path.stem}.{sha256(content).hexdigest()[:8]}{path.suffix}")
    write_atomically(kept, content)
    log.info("verdicts that %s no longer holds are kept in %s", path, kept)


def _has_verdict(line: Mapping[str, Any]) -> bool:
    return (
        isinstance(line.get("safe"), bool) or SecondVerdict.of(line.get("second_judge")) is not None
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        document = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without lines that a kill has torn; none if it is missing."""
    try:
        raw = path.read_bytes()
    except OSError:
        return []
    lines = []
    for line in raw.split(b"\n"):
        try:
            document = parse_json(line)
        except ValueError:
            continue
        if isinstance(document, dict):
            lines.append(document)
    return lines


def no_scores() -> dict[str, Any]:
    """What :func:`scores` gives, of completions that nobody made: no count, no share."""
    shares = (
        "refused",
        "no_verdict",
        "refusal_rate",
        "refusal_score",
        "refusal_score_ci",
        "refused_at_start",
        "refused_later",
        "refused_later_at",
        "broken",
        "broken_refused",
        "classifier_rate",
        "classifier_rate_ci",
    )
    judged = {"safety_score": None, "safety_score_ci": None, "judged": 0, "judge_failed": 0}
    judged |= {"second_safety_score": None, "second_safety_score_ci": None}
    judged |= {"second_judged": 0, "second_judge_failed": 0}
    judged |= {"classified": 0, "classifier_truncated": 0}
    return {"n": 0} | dict.fromkeys(shares) | judged | {"categories": {}}


def rates(completions: Sequence[Completion]) -> dict[str, Any]:
    """Refusal and safety scores with Wilson's intervals (paper, section 2.2 and appendix D).

    ``refusal_score`` is the share that holds a refusal phrase among the answers: a completion whose
    thought has not ended is none, and counts under ``no_verdict``. ``safety_score`` is the share
    that the judge calls safe among those it judged. ``refusal_rate`` repeats ``refusal_score``.
    ``refused_at_start`` counts the refusals that open the answer, ``refused_later`` those behind a
    preamble, of ``refused_later_at`` tokens in the median. ``broken`` counts answers that loop, are
    garbled or empty, ``broken_refused`` those of them that hold a refusal phrase.
    """
    verdicts = [c.refused for c in completions if c.refused is not None]
    refused = sum(verdicts)
    safe = [c.safe for c in completions if c.safe is not None]
    score = refused / len(verdicts) if verdicts else None
    later = [c.refused_at for c in completions if c.refused_at]
    broken = [c for c in completions if c.broken is not None]
    labelled = [c.labelled for c in completions if c.labelled is not None]
    hits = sum(one.hit for one in labelled)
    seconds = [c.second for c in completions if c.second is not None]
    second = [one.safe for one in seconds if one.safe is not None]
    return {
        "n": len(completions),
        "refused": refused,
        "no_verdict": len(completions) - len(verdicts),
        "refusal_rate": score,
        "refusal_score": score,
        "refusal_score_ci": wilson(refused, len(verdicts)) if verdicts else None,
        "refused_at_start": refused - len(later),
        "refused_later": len(later),
        "refused_later_at": median_low(later) if later else None,
        "broken": len(broken),
        "broken_refused": sum(bool(c.refused) for c in broken),
        "safety_score": sum(safe) / len(safe) if safe else None,
        "safety_score_ci": wilson(sum(safe), len(safe)) if safe else None,
        "second_safety_score": sum(second) / len(second) if second else None,
        "second_safety_score_ci": wilson(sum(second), len(second)) if second else None,
        "second_judged": len(second),
        "second_judge_failed": sum(one.error is not None for one in seconds),
        "classifier_rate": hits / len(labelled) if labelled else None,
        "classifier_rate_ci": wilson(hits, len(labelled)) if labelled else None,
        "classified": len(labelled),
        "classifier_truncated": sum(one.truncated for one in labelled),
        "judged": len(safe),
        "judge_failed": sum(c.judge_error is not None for c in completions),
    }


def scores(completions: Sequence[Completion]) -> dict[str, Any]:
    """:func:`rates` of all completions, and of each category under ``categories``."""
    names = sorted({c.category for c in completions if c.category is not None})
    return rates(completions) | {
        "categories": {
            name: rates([c for c in completions if c.category == name]) for name in names
        }
    }


def share_changes(
    now: Sequence[Completion] | None, before: Sequence[Completion] | None
) -> dict[str, Any]:
    """How refusal and safety scores of the same prompts differ, with Newcombe's paired intervals.

    Args:
        now: completions under an intervention, or None if none were generated.
        before: those of the baseline, in the same order.

    Returns:
        ``refusal_score``, ``safety_score``, ``second_safety_score`` (of a second judge) and
        ``classifier_rate``, each the difference over the
        prompts that have the figure in both, ``..._ci`` its interval, ``..._n`` how many prompts
        these are and ``..._p`` the exact McNemar test's; None, None, 0 and None where there are
        none.
    """
    together = list(zip(now or (), before or (), strict=now is not None and before is not None))
    refused = [
        (one.refused, other.refused)
        for one, other in together
        if one.refused is not None and other.refused is not None
    ]
    safe = [
        (one.safe, other.safe)
        for one, other in together
        if one.safe is not None and other.safe is not None
    ]
    labelled = [
        (one.labelled.hit, other.labelled.hit)
        for one, other in together
        if one.labelled is not None and other.labelled is not None
    ]
    second = [
        (one.second.safe, other.second.safe)
        for one, other in together
        if one.second is not None
        and one.second.safe is not None
        and other.second is not None
        and other.second.safe is not None
    ]
    changes: dict[str, Any] = {}
    for score, pairs in (
        ("refusal_score", refused),
        ("safety_score", safe),
        ("second_safety_score", second),
        ("classifier_rate", labelled),
    ):
        gained = sum(one - other for one, other in pairs)
        changes[score] = gained / len(pairs) if pairs else None
        changes[f"{score}_ci"] = newcombe_paired(pairs) if pairs else None
        changes[f"{score}_n"] = len(pairs)
        changes[f"{score}_p"] = mcnemar(pairs) if pairs else None
    return changes
