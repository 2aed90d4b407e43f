"""fragility: how much of a model's refusal hangs on one direction?

The direction is removed by and by, ``c <- c - s (c . r) r`` for ``s`` from 0 to 1 in every
component output (paper, section 2.4, at part strength), and refusal and KL are measured at each
step. The one number is the mean share of refusals that is lost on the way,
``F = 1 - integral of rate(s) ds / rate(0)``: 0 where ablation changes nothing, 0.5 where refusals
fall in proportion, near 1 where the first tenth takes them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.direction import FILE_NAME, Direction, load_directions
from abliterate.direction_set import DirectionSet
from abliterate.errors import InputError, UsageError
from abliterate.extraction.means import find_refusal_tokens
from abliterate.inference.in_memory import engine_of
from abliterate.inference.interventions import ablate
from abliterate.inference.thinks_first import or_thinks_first
from abliterate.inference.thoughts import AnswerLimits, ask
from abliterate.metrics.intervals import share_methods, wilson
from abliterate.metrics.refusal import kl_divergence, refusal_score
from abliterate.metrics.refusal_phrases import ALL, RefusalPhrases, parse_phrases
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat, encode
from abliterate.prompts.sources import Prompt
from abliterate.run_folder import Session, prompt_keys, prompt_sources, token_records
from abliterate.run_records import read_used, used_prompts, used_refusal_tokens
from abliterate.run_rendering import extracted_of, settle_rendering
from abliterate.run_stage import Stage
from abliterate.storage.artifacts import hash_file

FRAGILITY = "fragility.json"
FRAGILITY_STAGE = Stage("fragility", FRAGILITY, reads_only=True)


@dataclass(frozen=True)
class Point:
    """What removing a share of the direction does.

    Attributes:
        fraction: the share, 0 to 1.
        bypass_score: mean refusal score of the harmful prompts.
        refusal_rate: share of harmful prompts whose answer holds a refusal phrase.
        harmless_refusal_rate: the same of the harmless prompts.
        kl_divergence: mean last-token KL(baseline || ablated) on the harmless prompts, nats.
        refusal_rate_ci: Wilson's 95% interval of ``refusal_rate``.
        harmless_refusal_rate_ci: that of ``harmless_refusal_rate``.
        no_verdict: harmful prompts whose thought did not end, of which neither is known.
        harmless_no_verdict: such harmless ones.
    """

    fraction: float
    bypass_score: float
    refusal_rate: float
    harmless_refusal_rate: float
    kl_divergence: float
    refusal_rate_ci: tuple[float, float] | None = None
    harmless_refusal_rate_ci: tuple[float, float] | None = None
    no_verdict: int = 0
    harmless_no_verdict: int = 0


def measure(
    loaded: LoadedModel,
    direction: Direction | DirectionSet,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    refusal_tokens: Sequence[int],
    fractions: Sequence[float],
    *,
    chat: ChatFormat | None = None,
    max_new_tokens: int = 64,
    batch_size: int | str = "auto",
    phrases: RefusalPhrases = ALL,
) -> list[Point]:
    """Refusal and KL at each fraction, in the order given.

    Raises:
        InputError: the direction does not fit.
        UnsupportedArchitectureError: the writers are not known, or only all can be ablated.
        UsageError: a fraction is not between 0 and 1, or the model's weights are not in memory.
    """
    engine, chat = engine_of(loaded), chat or ChatFormat()
    along = direction if isinstance(direction, DirectionSet) else direction.vector
    texts = {
        kind: [prompt.text for prompt in prompts]
        for kind, prompts in (("harmful", harmful), ("harmless", harmless))
    }
    prompt_ids = {kind: encode(loaded.tokenizer, given, chat) for kind, given in texts.items()}
    # First tokens are scored where the answer begins: behind the model's thought, if it is asked.
    ids = {
        kind: ask(loaded, given, chat, batch_size, kind).finished(kind)
        for kind, given in texts.items()
    }
    limits = AnswerLimits.of(
        loaded, chat, [row for rows in prompt_ids.values() for row in rows], max_new_tokens
    )
    points = []
    with engine.in_memory("fragility") as model:
        unmodified = engine.last_logits({"harmless": ids["harmless"]}, {"": None}, batch_size)[""]
        for fraction in fractions:
            description = f"fragility: {fraction:g} of the direction"
            with ablate(model, along, fraction):
                logits = engine.last_logits(ids, {"": None}, batch_size, description)[""]
                answers = {
                    kind: engine.answers(rows, limits.longest, batch_size, description, chat=chat)
                    for kind, rows in prompt_ids.items()
                }
            (harmful_refusals, n_harmful), (harmless_refusals, n_harmless) = (
                _count_refusals(limits, answers[kind], phrases) for kind in ("harmful", "harmless")
            )
            points.append(
                Point(
                    fraction,
                    float(refusal_score(logits["harmful"], refusal_tokens).mean()),
                    harmful_refusals / n_harmful,
                    harmless_refusals / n_harmless,
                    float(kl_divergence(unmodified["harmless"], logits["harmless"]).mean()),
                    wilson(harmful_refusals, n_harmful),
                    wilson(harmless_refusals, n_harmless),
                    len(harmful) - n_harmful,
                    len(harmless) - n_harmless,
                )
            )
    return points


def _count_refusals(
    limits: AnswerLimits, answers: Sequence[Sequence[int]], phrases: RefusalPhrases
) -> tuple[int, int]:
    """How many answers, as token ids, hold a refusal phrase, and of how many that is known.

    Raises:
        InputError: of none: every thought was cut off.
    """
    verdicts = [phrases.verdict(limits.read(answer)[1]) for answer in answers]
    known = [verdict for verdict in verdicts if verdict is not None]
    if not known:
        raise InputError("no answer comes after the model's thought: raise --max-new-tokens")
    if len(known) < len(verdicts):
        log.warning(
            "%d of %d answers are unfinished thoughts, which count for neither side: raise "
            "--max-new-tokens",
            len(verdicts) - len(known),
            len(verdicts),
        )
    return sum(known), len(known)


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
    given = session.settings.evaluate
    phrases = parse_phrases(given.refusal_phrases, given.refusal_phrase)
    with FRAGILITY_STAGE.open(session, out) as stage:
        direction, records = load_directions(run), read_used(run)
        chosen = session.settings.evaluate
        sources = prompt_sources(session.settings, chosen.harmful, chosen.harmless)
        prompts = session.draw(sources, "test", n_test, "--n-test", used_prompts(records))
        settle_rendering(session, run, extracted_of(session, run))
        loaded, batch_size = session.load_in_memory(), session.settings.model.batch_size
        tokens = _refusal_tokens(session, loaded, prompts, records)
        stage.start_clock()
        points = measure(
            loaded,
            direction,
            prompts["harmful"],
            prompts["harmless"],
            tokens,
            [step / (steps - 1) for step in range(steps)],
            chat=session.chat,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            phrases=phrases,
        )
        return stage.finish(
            {
                "direction": direction.summary() | {"sha256": hash_file(run / FILE_NAME)},
                **summarise(points),
                "points": [asdict(point) for point in points],
                "n_prompts": {kind: len(chosen) for kind, chosen in prompts.items()},
                "intervals": share_methods(),
                "prompts": prompt_keys(prompts),
                "max_new_tokens": max_new_tokens,
                "refusal_phrases": phrases.summary(),
                "refusal_tokens": token_records(loaded.tokenizer, tokens),
            }
        )


def _refusal_tokens(
    session: Session,
    loaded: LoadedModel,
    prompts: Mapping[str, Sequence[Prompt]],
    records: Sequence[Mapping[str, Any]],
) -> list[int]:
    """Those of the run's first record, else those that the model's own first tokens show."""
    named, batch_size = used_refusal_tokens(records), session.settings.model.batch_size
    if named:  # nothing is run to find them
        return find_refusal_tokens(loaded, (), (), named, batch_size)
    texts = {kind: [prompt.text for prompt in chosen] for kind, chosen in prompts.items()}
    harmful, harmless = (
        ask(loaded, texts[kind], session.chat, batch_size, kind).finished(kind)
        for kind in ("harmful", "harmless")
    )
    with or_thinks_first(loaded, session.chat, harmful):
        return find_refusal_tokens(loaded, harmful, harmless, named, batch_size)
