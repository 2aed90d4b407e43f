"""Sampling prompts from a source: seeded, without duplicates, and never the same prompt twice
across train, validation and test."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, MutableMapping
from functools import lru_cache

from abliterate.errors import InputError
from abliterate.prompts.sources import Prompt, PromptSource, read_source
from abliterate.storage.artifacts import hash_text

_NOT_WORD = re.compile(r"[\W_]+")


@lru_cache(maxsize=1 << 14)  # duplicates, those in use and the order: all ask for the same
def normalise(text: str) -> str:
    """The form in which two prompts count as the same: NFKC, casefolded, words only.

    A text without any word character (other scripts' symbols, emoji) stays as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _NOT_WORD.sub(" ", folded).strip() or folded.strip()


def prompt_key(text: str) -> str:
    """A short hash of the normalised text: how artifacts record which prompts they used."""
    return hash_text(normalise(text))[:16]


def deduplicate(prompts: Iterable[Prompt], exclude: Collection[str] = ()) -> list[Prompt]:
    """The first of each normalised text, in order, leaving out the normalised ``exclude``."""
    seen = set(exclude)
    kept = []
    for prompt in prompts:
        key = normalise(prompt.text)
        if key not in seen:
            seen.add(key)
            kept.append(prompt)
    return kept


def split_pool(source: PromptSource, split: str) -> list[Prompt]:
    """The distinct prompts that ``split`` may be drawn from.

    A source with splits gives that split less what is also in another one (the earlier of train,
    val, test keeps it); one without gives all of its prompts, and the caller excludes those in use.
    """
    if "all" in source.splits:
        return deduplicate(source.splits["all"])
    taken: set[str] = set()
    for name, prompts in source.splits.items():
        pool = deduplicate(prompts, taken)
        if name == split:
            return pool
        taken |= {normalise(prompt.text) for prompt in pool}
    raise InputError(
        f"prompt source '{source.spec}' has no split '{split}' (it has: {', '.join(source.splits)})"
    )


def load_prompts(
    spec: str,
    split: str = "train",
    n: int | None = None,
    seed: int = 0,
    exclude: Collection[str] = (),
    option: str = "n",
    leave_out: Callable[[Prompt], bool] = lambda prompt: False,
    commits: MutableMapping[str, str] | None = None,
) -> list[Prompt]:
    """Load and sample prompts from a source.

    Args:
        spec: bundled set, preset, file or hub dataset (see :mod:`abliterate.prompts.sources`).
        split: ``train``, ``val`` or ``test``; a source without splits is drawn from whole.
        n: how many to draw (seeded, in the drawn order), or None for all in source order.
        seed: of the sampling.
        exclude: :func:`prompt_key` of the prompts already in use, which are left out.
        option: the option that sets ``n``, for the error message.
        leave_out: tells which prompts of the source do not belong there.
        commits: as of :func:`~abliterate.prompts.sources.read_source`.

    Raises:
        InputError: the source is unusable or has fewer than ``n`` prompts left.

    Source:
        Section 2.2 and appendix A.

    Examples:
        >>> len(ab.load_prompts("harmless", "val", 4))
        4
    """
    source = read_source(spec, commits)
    pool = [
        p
        for p in split_pool(source, split)
        if prompt_key(p.text) not in exclude and not leave_out(p)
    ]
    named = f"prompt source '{spec}'" + ("" if "all" in source.splits else f" ({split} split)")
    if n is None:
        if not pool:
            raise InputError(
                f"{named} has no prompts left that are not in use already: give another source"
            )
        return pool
    if n < 1:
        raise InputError(f"{option} must be at least 1, not {n}")
    if len(pool) < n:
        unused = " left that are not in use already" if exclude else ""
        raise InputError(
            f"{named} has {len(pool)} distinct prompts{unused}, {n} asked for: lower {option} or "
            "give a larger source"
        )
    # Sorted first, so that the order of the rows in the file does not change the sample.
    pool = sorted(pool, key=lambda prompt: normalise(prompt.text))
    return random.Random(seed).sample(pool, n)
