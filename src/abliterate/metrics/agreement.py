"""How far two raters of the same answers agree, beyond what chance gives: Cohen's kappa."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.metrics.intervals import CONFIDENCE, resamples


def agreement(pairs: Sequence[tuple[bool, bool]], seed: int) -> dict[str, Any]:
    """Cohen's kappa of two raters with two verdicts each.

    Args:
        pairs: for each answer what the one and what the other says, at least one.
        seed: of the bootstrap over answers.

    Returns:
        ``n``; ``agreed``, the share both say the same of; ``kappa``, ``(p - e) / (1 - e)`` with
        ``p`` that share and ``e`` what raters with these frequencies would agree in by chance: None
        where that is all (both always say the same one thing); ``kappa_ci``, the percentile
        bootstrap's 95% interval, of the resamples that have a kappa, and ``undefined``, how many
        have none. Answers that leave every resample the same kappa tell no interval: it is None,
        and ``no_interval`` says why.
    """
    import numpy as np

    verdicts = np.array(pairs, dtype=bool)

    def kappas(drawn: Any) -> Any:  # [resamples, n, 2]
        agreed = (drawn[..., 0] == drawn[..., 1]).mean(1)
        shares = drawn.mean(1)
        chance = shares.prod(1) + (1 - shares).prod(1)
        room = np.where(chance < 1, 1 - chance, np.nan)
        return (agreed - chance) / room

    (kappa,) = kappas(verdicts[None]).tolist()
    drawn = np.concatenate([kappas(verdicts[rows]) for rows in resamples(len(pairs), seed)])
    known = drawn[~np.isnan(drawn)]
    tail = (1 - CONFIDENCE) / 2
    spread = len(known) > 0 and float(known.max()) > float(known.min())
    return {
        "n": len(pairs),
        "agreed": float((verdicts[:, 0] == verdicts[:, 1]).mean()),
        "kappa": None if np.isnan(kappa) else kappa,
        "kappa_ci": np.quantile(known, [tail, 1 - tail]).tolist() if spread else None,
        "undefined": len(drawn) - len(known),
        **({} if spread else {"no_interval": _why_none(pairs)}),
    }


def _why_none(pairs: Sequence[tuple[bool, bool]]) -> str:
    constant = [len({pair[rater] for pair in pairs}) == 1 for rater in (0, 1)]
    if all(constant):
        return "each always says one thing"
    if any(constant):
        return f"the {'first' if constant[0] else 'second'} always says one thing"
    return "they agree on every answer" if all(a == b for a, b in pairs) else "too few answers"


def kappa_text(found: Mapping[str, Any]) -> str:
    """Kappa with its interval, or why there is none; records of old do not say why."""
    kappa, span, why = found["kappa"], found["kappa_ci"], found.get("no_interval")
    if kappa is None:
        return f"not defined: {why or 'each always says one thing'}"
    if why is None and span and span[0] == span[1]:
        span, why = None, "all resamples have the same"
    behind = (
        f" [{span[0]:z.2f}, {span[1]:z.2f}]" if span else f" (no interval: {why})" if why else ""
    )
    return f"{kappa:z.2f}{behind}"
