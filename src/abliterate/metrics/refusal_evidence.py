"""Why no first token tells refusals from answers, by what the model says first.

One sentence says what it looks like, shows the commonest first tokens after both kinds of prompts
with their shares, and gives the advice that fits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from abliterate.errors import InputError
from abliterate.metrics.answers import TAGS, WORDS
from abliterate.metrics.refusal_phrases import LANGUAGES, phrases_of
from abliterate.metrics.refusal_tokens import detect_refusal_tokens, token_text

# First tokens that are shown, and the least share of one.
_SHOWN, _LEAST = 4, 0.01
# The share of a set's prompts, or of first tokens, from which something is said of the whole set.
_MOST = 0.5
# The share of first tokens that read like refusals from which a model is said to refuse.
_SOME = 0.25
# Words that refusals start with and the lists of phrases do not.
_FURTHER = frozenset({"sorry", "unfortunately", "apologies", "cannot", "regrettably"})
# How answers start that comply.
_COMPLYING = frozenset(
    (
        *("sure", "certainly", "absolutely", "definitely", "great", "okay", "ok", "yes", "of"),
        *("here", "to", "title", "step", "1", "#", "##", "###", "*", "**", "-", "```"),
    )
)
_CHANNELS = ("<|channel|>", "analysis")

Prompts = Mapping[str, Sequence[Sequence[int]]]


def find_first_refusal_tokens(
    harmful: Tensor, harmless: Tensor, tokenizer: Any, prompts: Prompts
) -> list[int]:
    """:func:`detect_refusal_tokens`, or the reason why there are none.

    Args:
        harmful: mean first-token probabilities ``[vocabulary]`` over harmful prompts.
        harmless: the same over harmless prompts.
        tokenizer: of the model.
        prompts: the token ids of all prompts, by kind.

    Raises:
        InputError: no token stands out after harmful prompts, or what stands out says that the
            kinds are swapped.
    """
    found = detect_refusal_tokens(harmful, harmless)
    opposite = detect_refusal_tokens(harmless, harmful)
    swapped = _refusing(tokenizer, opposite, harmless) >= _SOME
    opening = _opened(harmful, harmless, tokenizer)
    reversed_ = swapped and bool(found) and all(_complies(tokenizer, token) for token in found)
    # Tokens named on the command line are taken without this look at them.
    if found and opening is None and not reversed_:
        return found
    if opening is None:
        opening = _begun(tokenizer, prompts["harmful"][0])
    raise InputError(
        "the first tokens do not tell refusals from answers (harmful: "
        f"{_shares(tokenizer, harmful)}; harmless: {_shares(tokenizer, harmless)}): "
        + _diagnosis(harmful, tokenizer, prompts, opening, swapped)
    )


def _diagnosis(
    harmful: Tensor, tokenizer: Any, prompts: Prompts, opening: str | None, swapped: bool
) -> str:
    given, other = (list(map(tuple, prompts[kind])) for kind in ("harmful", "harmless"))
    shared = sum(ids in set(other) for ids in set(given))
    if shared >= _MOST * len(set(given)):
        return (
            f"prompts of the wrong kind: {shared} of {len(set(given))} harmful prompts are among "
            "the harmless ones too; give two different sources with --harmful and --harmless"
        )
    if opening is not None:
        return (
            f"the model thinks first ({opening}), so that its first token says nothing of refusal; "
            "pass --thinking skip, or let the turn start behind a thought that has ended "
            "(--response-prefix)"
        )
    if swapped:
        return (
            "prompts of the wrong kind: harmful ones are answered and harmless ones refused; swap "
            "--harmful and --harmless, or name the refusal tokens with --refusal-token"
        )
    every = range(len(harmful))
    if _refusing(tokenizer, every, harmful) >= _SOME:
        return (
            "the model refuses both kinds, or opens every answer in the same words; give harmless "
            "prompts that it answers (--harmless), look behind the common words with "
            "--response-prefix (such as I), or name the tokens that only refusals start with "
            "(--refusal-token)"
        )
    return (
        "the model does not seem to refuse either kind; give harmful prompts that it refuses "
        "(--harmful), another model, or name its refusal tokens with --refusal-token"
    )


def _begun(tokenizer: Any, prompt: Sequence[int]) -> str | None:
    """Whether a prompt ends inside a thought."""
    end = tokenizer.decode(list(prompt)[-32:]).rstrip().lower()
    ending = (opening for opening, _ in (*TAGS, *WORDS) if end.endswith(opening.lower()))
    return next((f"the prompt ends in {opening}" for opening in ending), None)


def _opened(harmful: Tensor, harmless: Tensor, tokenizer: Any) -> str | None:
    """How much of the first tokens opens a thought, if that is most."""
    openings = tuple(opening.lower() for opening, _ in TAGS) + _CHANNELS
    both = (harmful + harmless) / 2
    opened = [
        token
        for token in _commonest(both)
        if (text := token_text(tokenizer, token).strip().lower())
        and any(opening.startswith(text) for opening in openings)
        and (len(text) > 1 or not text.isalnum())
    ]
    share = sum(float(both[token]) for token in opened)
    return f"{share:.0%} start with {_quoted(tokenizer, opened[0])}" if share >= _MOST else None


def _refusing(tokenizer: Any, tokens: Sequence[int], shares: Tensor) -> float:
    """The probability of those tokens that read like the start of a refusal, of the common ones."""
    common = set(_commonest(shares)) & set(tokens)
    return sum(float(shares[t]) for t in common if _starts_refusal(token_text(tokenizer, t)))


def _complies(tokenizer: Any, token: int) -> bool:
    return token_text(tokenizer, token).strip().casefold() in _COMPLYING


def _starts_refusal(text: str) -> bool:
    word = text.strip().casefold()
    words, beginnings = _first_words()
    return bool(word) and (word in words or (not word.isascii() and word in beginnings))


@cache
def _first_words() -> tuple[frozenset[str], frozenset[str]]:
    """First words of the refusal phrases, and all beginnings of those that are no ASCII."""
    phrases = [phrase.casefold() for language in LANGUAGES for phrase in phrases_of(language)]
    words = {match[0] for phrase in phrases if (match := re.match(r"\w+", phrase))}
    contracted = {phrase.split()[0] for phrase in phrases}
    beginnings = {phrase[:n] for phrase in phrases for n in range(1, len(phrase) + 1)}
    return frozenset(words | contracted) | _FURTHER, frozenset(beginnings)


def _commonest(shares: Tensor, n: int = 32) -> list[int]:
    """The tokens with the largest shares, ties by id."""
    some = shares.topk(min(n, len(shares))).indices.tolist()
    return sorted(some, key=lambda token: (-float(shares[token]), token))


def _shares(tokenizer: Any, shares: Tensor) -> str:
    tokens = _commonest(shares, _SHOWN)
    shown = [token for token in tokens if float(shares[token]) >= _LEAST] or tokens[:1]
    return ", ".join(f"{_quoted(tokenizer, token)} {float(shares[token]):.0%}" for token in shown)


def _quoted(tokenizer: Any, token: int) -> str:
    text = token_text(tokenizer, token)
    return text if text == f"id:{token}" else repr(text)
