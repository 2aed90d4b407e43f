"""What a model thinks and what it answers, told apart in the text of a completion.

Reasoning models write a thought before the answer: between tags (``<think>``), in channels
(harmony: analysis, commentary, final), or from the prompt's own opening tag to a closing one. Only
the answer can refuse or comply; a thought that has not ended is no answer at all.
"""

from __future__ import annotations

import re
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
# What the final channel of harmony opens with.
FINAL = "<|channel|>final<|message|>"
# Special tokens of harmony, which part its messages.
HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>",
           "<|constrain|>")  # fmt: skip
# Marks around an answer that follows a thought; they are none of its words.
_AROUND = (
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<response>", "</response>"),
    ("<answer>", "</answer>"),
)
# Special tokens by which thought and answer are told apart: decoding must not drop them.
MARKS = frozenset(
    [mark for pair in (*TAGS, *_AROUND) for mark in pair] + ["<|channel>", "<|channel|>"]
)
_OPENING = re.compile(r"\s*(?:" + "|".join(re.escape(opening) for opening, _ in TAGS) + ")", re.I)
_CLOSING = re.compile("|".join(re.escape(closing) for _, closing in TAGS), re.I)
_CLOSED_BY = {opening.lower(): closing for opening, closing in TAGS}

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

    Args:
        text: the completion.
        begun: the prompt has opened a thought already, so that the text goes on with it.
    """
    if (channels := _channels(text)) is not None:
        return channels
    thoughts: list[str] = []
    rest = text
    if begun and _CLOSING.search(text) is None:
        return Parts(text.strip(), None)
    # A closing tag that nothing opened: the prompt ended within the thought.
    first_open, first_close = _OPENING.match(rest), _CLOSING.search(rest)
    if first_open is None and first_close is not None:
        thoughts.append(rest[: first_close.start()].strip())
        rest = rest[first_close.end() :]
    while (opening := _OPENING.match(rest)) is not None:
        closing = _CLOSED_BY[opening[0].strip().lower()]
        inside, closed, rest = _cut(rest[opening.end() :], closing)
        thoughts.append(inside.strip())
        if not closed:
            return Parts("\n\n".join(filter(None, thoughts)), None)
    if not thoughts:
        return Parts("", None) if _is_cut_opening(text) else Parts(None, text)
    return Parts("\n\n".join(filter(None, thoughts)), _bare(rest.strip()))


def _is_cut_opening(text: str) -> bool:
    """Whether a text is the beginning of a thought's opening mark, and nothing else."""
    begun = text.strip().lower()
    return len(begun) > 1 and any(opening.startswith(begun) for opening in _CLOSED_BY)


def _bare(answer: str) -> str:
    """An answer without the marks that some families put around it."""
    for opening, closing in _AROUND:
        if answer.startswith(opening):
            return answer.removeprefix(opening).strip().removesuffix(closing).strip()
    return answer


def opening_mark(text: str) -> str | None:
    """The mark of a thought that a completion begins with; None if it begins with none."""
    if (opening := _OPENING.match(text)) is not None:
        return opening[0].strip()
    channel = _CHANNEL.match(text.strip()) or _BARE_CHANNEL.match(text.strip())
    return None if channel is None or channel[1] == "final" else f"the channel {channel[1]}"


def closing_start(text: str) -> int:
    """Where the last mark begins that ends a thought, or harmony's message before the answer."""
    if (final := text.rfind(FINAL)) >= 0:
        before = text[:final].removesuffix("<|start|>assistant").removesuffix("<|end|>")
        return len(before)
    return max((found.start() for found in _CLOSING.finditer(text)), default=len(text))


def _cut(text: str, tag: str) -> tuple[str, bool, str]:
    found = re.search(re.escape(tag), text, re.I)
    return (
        (text, False, "") if found is None else (text[: found.start()], True, text[found.end() :])
    )


def _channels(text: str) -> Parts | None:
    """The parts of a text in harmony's channels; None if it has none."""
    marks = list(_CHANNEL.finditer(text))
    if not marks and text.lstrip().startswith("<|channel|>"):  # cut off in its first header
        return Parts("", None)
    if not marks and _BARE_FINAL.match(text.lstrip()):
        text = text.lstrip()
        marks = list(_BARE_HEADER.finditer(text))
    if not marks:
        marks = list(_BARE_CHANNEL.finditer(text))
        # Without its special tokens a text is harmony if it starts with a channel's name.
        if not marks or text[: marks[0].start()].strip():
            return None
    messages: list[tuple[str, str]] = []
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        said = text[mark.end() : after.start() if after else len(text)]
        messages.append((mark[mark.lastindex or 1], _HEADER.split(said)[0].strip()))
    final = [said for channel, said in messages if channel == "final"]
    thought = "\n\n".join(said for channel, said in messages if channel != "final" and said)
    return Parts(thought or None, "\n\n".join(final) if final else None)
