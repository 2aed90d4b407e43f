"""What a model thinks and what it answers, told apart in the text of a completion.

Reasoning models write a thought before the answer: between tags (``<think>``), in channels
(harmony: analysis, commentary, final), or from the prompt's own opening tag to a closing one. Only
the answer can refuse or comply; a thought that has not ended is no answer at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Opening and closing tags, as published chat templates write them.
TAGS = (
    ("<think>", "</think>"),  # DeepSeek R1, Qwen3, MiniMax, Nemotron, GLM
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reason>", "</reason>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<unused94>", "<unused95>"),  # MedGemma
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<longcat_think>", "</longcat_think>"),
)
# Marks in words: the second ends a thought only behind the first.
WORDS = (
    ("Here is my thought process:", "Here is my response:"),  # Granite 3.2
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
)
# What the final channel of harmony opens with.
FINAL = "<|channel|>final<|message|>"
# Special tokens of harmony, which part its messages.
HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>",
           "<|constrain|>")  # fmt: skip
# Marks around an answer that follows a thought; they are none of its words.
AROUND = (
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<response>", "</response>"),
    ("<answer>", "</answer>"),
    ("<output>", "</output>"),
    ("", "[END FINAL RESPONSE]"),
)
# Special tokens by which thought and answer are told apart: decoding must not drop them.
MARKS = frozenset(
    [mark for pair in (*TAGS, *AROUND) for mark in pair if mark] + ["<|channel>", "<|channel|>"]
)
Family = tuple[str, str]
_FAMILIES = {mark.lower(): pair for pair in (*TAGS, *WORDS) for mark in pair}
_CLOSED_BY = {opening.lower(): closing for opening, closing in (*TAGS, *WORDS)}
_QUOTES = "`'\"\u2018\u2019\u201c\u201d\u00ab\u00bb"
_BLANK = " \t\r\n\x0b\x0c\u00a0\u200b\ufeff"


def _any_of(marks: Iterable[str], before: str = "") -> re.Pattern[str]:
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile(before + "(?:" + "|".join(map(re.escape, longest_first)) + ")", re.I)


_MARK = _any_of(_FAMILIES)
_OPENING = _any_of(_CLOSED_BY, f"[{_BLANK}]*")
_OPENINGS = re.compile(f"(?:{_OPENING.pattern})*", re.I)
_CLOSING = _any_of(closing for _, closing in TAGS)
# Behind a preamble a thought is opened on a line of its own.
_LATE = re.compile(
    rf"^[ \t]*{_any_of(opening for opening, _ in TAGS).pattern}[ \t]*\r?$", re.I | re.M
)
_ENDING = _any_of(_CLOSED_BY.values())

# Harmony with its special tokens, and as it reads when they are left out in decoding.
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_HEADER = re.compile(r"<\|(?:start|end|return|call)\|>")
_BARE_CHANNEL = re.compile(r"(?:^|assistant)(analysis|commentary|final)(?=[^\sa-z:,.]|$)")
# What follows a name need not tell it from a word where a later header shows that it was one.
_BARE_HEADER = re.compile(r"^(analysis|commentary)|assistant(analysis|commentary|final)")
_BARE_FINAL = re.compile(r"(?:analysis|commentary).*assistantfinal", re.DOTALL)


@dataclass(frozen=True)
class Parts:
    """A completion in its parts.

    Attributes:
        thought: what was thought; None if nothing was.
        answer: what was said, without white space around it where something was thought; None
            where the thought has not ended.
    """

    thought: str | None
    answer: str | None


def split_thought(text: str, begun: bool = False) -> Parts:
    """Tell thought and answer apart.

    Thoughts may be nested, and others may stand within the answer. A text in which a closing mark
    comes without an opening one went on with a thought that its prompt had opened.

    Args:
        text: the completion.
        begun: the prompt has opened a thought already, so that the text goes on with it.
    """
    if (channels := _channels(text, begun)) is not None:
        return channels
    thoughts: list[str] = []
    said: list[str] = []
    rest: str | None = text
    family = _first_family(text, begun)
    if family is None:
        if (late := _LATE.search(text)) is not None:
            return Parts(text[late.end() :].strip(), None)
        return Parts("", None) if _is_cut_opening(text) else Parts(None, text)
    while family is not None and rest is not None:
        thought, rest = _cut_thought(rest, family)
        thoughts.append(thought.strip())
        if rest is not None:
            before, family, rest = _cut_answer(rest, family)
            said.append(before.strip())
    thought = "\n\n".join(filter(None, thoughts))
    return Parts(thought, None if rest is None else _bare("\n\n".join(filter(None, said))))


def first_thought_end(text: str, begun: bool = False) -> int | None:
    """Where the mark ends that ends the thought which a text starts with; None if none does."""
    if (family := _first_family(text, begun)) is None:
        return None
    rest = _cut_thought(text, family)[1]
    return None if rest is None else len(text) - len(rest)


def within_nested_thought(text: str, begun: bool = False) -> bool:
    """Whether a thought has closed what it opened within, and not itself yet."""
    family = _first_family(text, begun)
    if family is None:
        return False
    last, depth = _last_closing(_OPENINGS.sub("", text, count=1), family)
    return last is not None and depth > 0


def _first_family(text: str, begun: bool) -> Family | None:
    """Of the thought that a text begins with or goes on with; None if it does neither."""
    if (opening := _OPENING.match(text)) is not None:
        return _family(opening)
    for closing in (_ENDING if begun else _CLOSING).finditer(text):
        if begun or not _is_quoted(text, closing):
            return _family(closing)
    return TAGS[0] if begun else None


def _cut_thought(text: str, family: Family) -> tuple[str, str | None]:
    """What a text holds of a thought that it is in, and what follows; None if that has no end."""
    text = _OPENINGS.sub("", text, count=1)  # some are written twice
    # Where openings are only spoken of, the last closing mark ends it; else another family's does.
    end = _last_closing(text, family)[0] or _ENDING.search(text)
    return (text, None) if end is None else (text[: end.start()], text[end.end() :])


def _last_closing(text: str, family: Family) -> tuple[re.Match[str] | None, int]:
    """The closing mark that ends a thought, or the last one, and how many openings that leaves."""
    depth, last = 1, None
    if family[1].lower() not in text.lower():  # no need to look, which a loop of marks makes slow
        return last, depth
    for mark in _MARK.finditer(text):
        if _family(mark) == family and not _is_quoted(text, mark):
            closes = mark[0].lower() == family[1].lower()
            depth, last = (depth - 1, mark) if closes else (depth + 1, last)
            if depth == 0:
                break
    return last, depth


def _cut_answer(text: str, family: Family) -> tuple[str, Family | None, str]:
    """What a text behind a thought says before its next thought, whose that is, and the rest.

    A closing mark that nothing opened ends a thought too: what stands before it is one.
    """
    if (opening := _OPENING.match(text)) is not None:
        return "", _family(opening), text
    for mark in _MARK.finditer(text):
        if _family(mark) != family or family in WORDS or _is_quoted(text, mark):
            continue
        opens = mark[0].lower() == family[0].lower()
        return (text[: mark.start()], family, text[mark.start() :]) if opens else ("", family, text)
    return text, None, ""


def _family(mark: re.Match[str]) -> Family:
    return _FAMILIES[mark[0].strip(_BLANK).lower()]


def _is_quoted(text: str, mark: re.Match[str]) -> bool:
    """Whether a mark is spoken of, in quotation marks."""
    before, after = text[max(mark.start() - 1, 0) : mark.start()], text[mark.end() : mark.end() + 1]
    return bool(before and after) and before in _QUOTES and after in _QUOTES


def _is_cut_opening(text: str) -> bool:
    """Whether a text is the beginning of a thought's opening mark, and nothing else."""
    begun = text.strip().lower()
    return len(begun) > 1 and any(opening.lower().startswith(begun) for opening, _ in TAGS)


def _bare(answer: str) -> str:
    """An answer without the marks that some families put around it."""
    for opening, closing in AROUND:
        if answer.startswith(opening):
            return answer.removeprefix(opening).strip().removesuffix(closing).strip()
    return answer


def opening_mark(text: str) -> str | None:
    """The mark of a thought that a completion begins with; None if it begins with none."""
    if (opening := _OPENING.match(text)) is not None:
        return opening[0].strip(_BLANK)
    channel = _CHANNEL.match(text.strip()) or _BARE_CHANNEL.match(text.strip())
    return None if channel is None or channel[1] == "final" else f"the channel {channel[1]}"


def closing_start(text: str) -> int:
    """Where the last mark begins that ends a thought, or harmony's message before the answer."""
    if (final := text.rfind(FINAL)) >= 0:
        before = text[:final].removesuffix("<|start|>assistant").removesuffix("<|end|>")
        return len(before)
    return max((found.start() for found in _ENDING.finditer(text)), default=len(text))


def ends_in_thought_channel(text: str) -> bool:
    """Whether a prompt in harmony's channels ends within one that is no answer."""
    *_, last = [None, *_CHANNEL.finditer(text)]
    return last is not None and last[1] != "final" and not _HEADER.search(text, last.end())


def _channels(text: str, begun: bool) -> Parts | None:
    """The parts of a text in harmony's channels; None if it has none."""
    marks = list(_CHANNEL.finditer(text))
    if not marks and text.lstrip().startswith("<|channel|>"):  # cut off in its first header
        return Parts("", None)
    if not marks and (_BARE_FINAL.match(text.lstrip()) or (begun and "assistantfinal" in text)):
        text = text.lstrip()
        marks = list(_BARE_HEADER.finditer(text))
    if not marks:
        marks = list(_BARE_CHANNEL.finditer(text))
        # Without its special tokens a text is harmony if it starts with a channel's name.
        if not marks or text[: marks[0].start()].strip():
            return None
    # What stands before the first header goes on with what the prompt had opened.
    messages = [("analysis", _HEADER.split(text[: marks[0].start()])[0].strip())]
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        said = text[mark.end() : after.start() if after else len(text)]
        messages.append((mark[mark.lastindex or 1], _HEADER.split(said)[0].strip()))
    final = [said for channel, said in messages if channel == "final"]
    thought = "\n\n".join(said for channel, said in messages if channel != "final" and said)
    return Parts(thought or None, "\n\n".join(final) if final else None)
