"""fragility: how much of a model's refusal hangs on one direction?

The direction is removed by and by, ``c <- c - s (c . r) r`` for ``s`` from 0 to 1 in every
component output (paper, section 2.4, at part strength), and refusal and KL are measured at each
step. The one number is the mean share of refusals that is lost on the way,
``F = 1 - integral of rate(s) ds / rate(0)``: 0 where ablation changes nothing, 0.5 where refusals
fall in proportion, near 1 where the first tenth takes them all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from abliterate.direction import FILE_NAME, Direction, load_direction
from abliterate.errors import UsageError
from abliterate.extraction.means import find_refusal_tokens
from abliterate.inference.forward import all_last_logits
from abliterate.inference.generation import greedy_answers
from abliterate.inference.interventions import ablate
from abliterate.metrics.intervals import share_methods, wilson
from abliterate.metrics.refusal import kl_divergence, refusal_score
from abliterate.metrics.refusal_substrings import is_refusal
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat, encode
from abliterate.prompts.sampling import load_prompts, prompt_key
from abliterate.prompts.sources import Prompt
from abliterate.run_folder import Session, writing
from abliterate.run_records import read_used
from abliterate.storage.artifacts import hash_file, versions, write_json
from abliterate.storage.ownership import is_record

FRAGILITY = "fragility.json"


@dataclass(frozen=True)
class Point:
    """What removing a share of the direction does.

    Attributes:
        fraction: the share, 0 to 1.
        bypass_score: mean refusal score of the harmful prompts.
        refusal_rate: share of harmful prompts whose answer holds a refusal substring.
        harmless_refusal_rate: the same of the harmless prompts.
        kl_divergence: mean last-token KL(baseline || ablated) on the harmless prompts, nats.
        refusal_rate_ci: Wilson's 95% interval of ``refusal_rate``.
        harmless_refusal_rate_ci: that of ``harmless_refusal_rate``.
    """

    fraction: float
    bypass_score: float
    refusal_rate: float
    harmless_refusal_rate: float
    kl_divergence: float
    refusal_rate_ci: tuple[float, float] | None = None
    harmless_refusal_rate_ci: tuple[float, float] | None = None


def measure(
    loaded: LoadedModel,
    direction: Direction,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    refusal_tokens: Sequence[int],
    fractions: Sequence[float],
    chat: ChatFormat | None = None,
    max_new_tokens: int = 64,
    batch_size: int | str = "auto",
) -> list[Point]:
    """Refusal and KL at each fraction, in the order given.

    Raises:
        InputError: the direction does not fit.
        UnsupportedArchitectureError: the writers are not known, or only all can be ablated.
        UsageError: a fraction is not between 0 and 1.
    """
    ids = [
        encode(loaded.tokenizer, [p.text for p in prompts], chat or ChatFormat())
        for prompts in (harmful, harmless)
    ]
    baseline = all_last_logits(loaded.model, ids[1], batch_size)
    points = []
    for fraction in fractions:
        what = f"fragility: {fraction:g} of the direction"

        def removed(share: float = fraction) -> Any:
            return ablate(loaded.model, direction.vector, share)

        logits = [all_last_logits(loaded.model, i, batch_size, removed(), what) for i in ids]
        with removed():
            answers = [
                greedy_answers(loaded, i, max_new_tokens, batch_size, what, chat=chat) for i in ids
            ]
        refused = [
            sum(is_refusal(loaded.tokenizer.decode(one, skip_special_tokens=True)) for one in own)
            for own in answers
        ]
        spans = [wilson(count, len(own)) for count, own in zip(refused, answers, strict=True)]
        points.append(
            Point(
                fraction,
                float(refusal_score(logits[0], refusal_tokens).mean()),
                refused[0] / len(answers[0]),
                refused[1] / len(answers[1]),
                float(kl_divergence(baseline, logits[1]).mean()),
                spans[0],
                spans[1],
            )
        )
    return points


def summarise(points: Sequence[Point]) -> dict[str, float | None]:
    """The numbers of a curve.

    Returns:
        ``fragility``: F of this module's docstring, by trapezoids, or None if nothing is refused
        to begin with; ``half_fraction``: where the refusal rate first falls to half of its start,
        interpolated, or None; ``kl_at_half``: the KL there; ``remaining``: the share of refusals
        left once all is removed.
    """
    start = points[0].refusal_rate
    if start == 0:
        return {"fragility": None, "half_fraction": None, "kl_at_half": None, "remaining": None}
    pairs = list(pairwise(points))
    area = sum((b.fraction - a.fraction) * (a.refusal_rate + b.refusal_rate) / 2 for a, b in pairs)
    half = kl = None
    for a, b in pairs:
        if b.refusal_rate <= start / 2 < a.refusal_rate:
            part = (a.refusal_rate - start / 2) / (a.refusal_rate - b.refusal_rate)
            half = a.fraction + part * (b.fraction - a.fraction)
            kl = a.kl_divergence + part * (b.kl_divergence - a.kl_divergence)
            break
    return {
        "fragility": 1 - area / start,
        "half_fraction": half,
        "kl_at_half": kl,
        "remaining": points[-1].refusal_rate / start,
    }


def fragility_stage(
    session: Session, run: Path, out: Path, steps: int, n_test: int, max_new_tokens: int
) -> dict[str, Any]:
    """Measure the direction of ``run`` and write ``fragility.json`` into ``out``.

    Raises:
        InputError: the run folder lacks its direction or records.
        UsageError: the options make no curve, or there are too few prompts.
    """
    if steps < 2 or n_test < 1 or max_new_tokens < 1:
        raise UsageError("--steps must be at least 2, --n-test and --max-new-tokens at least 1")
    with writing(session.ranks, out, "fragility", {FRAGILITY: is_record}, "fragility"):
        return _fragility(session, run, out, steps, n_test, max_new_tokens)


def _fragility(
    session: Session, run: Path, out: Path, steps: int, n_test: int, max_new_tokens: int
) -> dict[str, Any]:
    direction = load_direction(run)
    records = read_used(run)
    settings, seed = session.settings, session.settings.model.seed
    sources = {
        "harmful": settings.evaluate.harmful or settings.extract.harmful,
        "harmless": settings.evaluate.harmless or settings.extract.harmless,
    }
    prompts = {
        kind: load_prompts(
            source,
            "test",
            n_test,
            seed,
            [key for record in records for key in record["prompts"][kind]],
            "--n-test",
        )
        for kind, source in sources.items()
    }
    loaded, size = session.load_in_memory(), settings.model.batch_size
    named = [str(token["id"]) for record in records[:1] for token in record["refusal_tokens"]]
    ids = [encode(loaded.tokenizer, [p.text for p in k], session.chat) for k in prompts.values()]
    tokens = find_refusal_tokens(loaded, ids[0], ids[1], named, size)
    begun = time.perf_counter()
    points = measure(
        loaded,
        direction,
        prompts["harmful"],
        prompts["harmless"],
        tokens,
        [step / (steps - 1) for step in range(steps)],
        session.chat,
        max_new_tokens,
        size,
    )
    record = {
        "model": session.identity,
        "direction": direction.summary() | {"sha256": hash_file(run / FILE_NAME)},
        **summarise(points),
        "points": [asdict(point) for point in points],
        "n_prompts": {kind: len(chosen) for kind, chosen in prompts.items()},
        "intervals": share_methods(),
        "prompts": {k: [prompt_key(p.text) for p in chosen] for k, chosen in prompts.items()},
        "max_new_tokens": max_new_tokens,
        "refusal_tokens": [{"id": i, "token": loaded.tokenizer.decode([i])} for i in tokens],
        "seed": seed,
        "versions": versions(),
        "seconds": time.perf_counter() - begun,
    }
    write_json(out / FRAGILITY, record)
    return record
