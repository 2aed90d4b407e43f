"""One completion: a prompt's response, whether it refuses, and what judges said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from abliterate.metrics.answer_flaws import count_pieces, flaw_of
from abliterate.metrics.answers import Parts, split_thought
from abliterate.metrics.refusal_phrases import ALL, RefusalPhrases
from abliterate.prompts.sources import Prompt

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
