"""fragility: how much of a model's refusal hangs on one direction?

The direction is removed by and by, ``c <- c - s (c . r) r`` for ``s`` from 0 to 1 in every
component output (paper, section 2.4, at part strength), and refusal and KL are measured at each
step. What is made of the curve is in :mod:`abliterate.analysis.fragility_curve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.analysis.fragility_curve import Point, summarise
from abliterate.console import log
from abliterate.direction import FILE_NAME, Direction
from abliterate.direction_loading import load_directions
from abliterate.direction_set import DirectionSet
from abliterate.errors import InputError, UsageError
from abliterate.extraction.other_layers import other_layers
from abliterate.extraction.refusal_token_search import find_refusal_tokens
from abliterate.inference.control_directions import (
    FIGURES,
    LAYERS,
    Control,
    activations_at,
    compared,
    measure_controls,
    random_controls,
)
from abliterate.inference.direction_fit import check_fit
from abliterate.inference.generation import RowLogits
from abliterate.inference.in_memory import engine_of
from abliterate.inference.interventions import ablate
from abliterate.inference.thinks_first import or_thinks_first
from abliterate.inference.thoughts import AnswerLimits, ask
from abliterate.metrics.intervals import bootstrap_settings, share_methods, wilson
from abliterate.metrics.refusal import kl_divergence, refusal_score
from abliterate.metrics.refusal_phrases import ALL, RefusalPhrases, parse_phrases
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat, encode
from abliterate.prompts.sources import Prompt
from abliterate.prompts.thinking import find_thinking
from abliterate.run_folder import DIRECTIONS, Session, prompt_keys, token_records
from abliterate.run_folder import FRAGILITY as FRAGILITY
from abliterate.run_records import read_extract, read_used, used_prompts, used_refusal_tokens
from abliterate.run_rendering import extracted_of, settle_rendering
from abliterate.run_stage import Stage
from abliterate.run_staleness import hash_prompts
from abliterate.storage.artifacts import hash_file

FRAGILITY_STAGE = Stage("fragility", FRAGILITY, reads_only=True)


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
    n_controls: int = 0,
    others: Mapping[int, Tensor] | None = None,
    seed: int = 0,
) -> tuple[list[Point], dict[str, Any] | None]:
    """Refusal and KL at each fraction, in the order given, and of controls at the last of them.

    The controls are ``n_controls`` random directions of each family and ``others``, candidates of
    other layers, all of each removed: first-token scores and KL, no answers. None without any, or
    where the last fraction is not 1.

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
    behind_thoughts = find_thinking(loaded.tokenizer, chat).mode == "skip"
    ids = prompt_ids
    if behind_thoughts:
        ids = {
            kind: ask(loaded, given, chat, batch_size, kind).finished(kind)
            for kind, given in texts.items()
        }
    limits = AnswerLimits.of(
        loaded, chat, [row for rows in prompt_ids.values() for row in rows], max_new_tokens
    )

    def answer(
        kinds: Sequence[str], description: str, answered: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, list[list[int]]]]:
        """First-token logits and answers, or the logits that known answers start from."""
        starts = {kind: RowLogits(len(prompt_ids[kind])) for kind in kinds}
        answers = {
            kind: engine.answers(
                prompt_ids[kind],
                limits.longest,
                batch_size,
                description,
                done=range(len(prompt_ids[kind])) if answered else (),
                chat=chat,
                on_first=None if behind_thoughts else taken.put,
            )
            for kind, taken in starts.items()
        }
        if behind_thoughts:
            some = {kind: ids[kind] for kind in kinds}
            return engine.last_logits(some, {"": None}, batch_size, description)[""], answers
        return {kind: taken.rows for kind, taken in starts.items()}, answers

    points = []
    unmodified: Tensor | None = None
    with engine.in_memory("fragility") as model:
        for fraction in fractions:
            description = f"fragility: {fraction:g} of the direction"
            with ablate(model, along, fraction):
                logits, answers = answer(("harmful", "harmless"), description)
            if unmodified is None and fraction == 0:
                unmodified = logits["harmless"]
            elif unmodified is None:
                unmodified = answer(["harmless"], "fragility", answered=True)[0]["harmless"]
            verdicts = {
                kind: _verdicts(limits, answers[kind], phrases, chat.longer_thoughts)
                for kind in ("harmful", "harmless")
            }
            (harmful_refusals, n_harmful), (harmless_refusals, n_harmless) = map(
                _counted, verdicts.values()
            )
            scores = refusal_score(logits["harmful"], refusal_tokens).tolist()
            divergences = kl_divergence(unmodified, logits["harmless"]).tolist()
            points.append(
                Point(
                    fraction,
                    sum(scores) / len(scores),
                    harmful_refusals / n_harmful,
                    harmless_refusals / n_harmless,
                    sum(divergences) / len(divergences),
                    wilson(harmful_refusals, n_harmful),
                    wilson(harmless_refusals, n_harmless),
                    len(harmful) - n_harmful,
                    len(harmless) - n_harmless,
                    tuple(scores),
                    tuple(divergences),
                    verdicts["harmful"],
                )
            )
        controls = None
        if (
            n_controls
            and unmodified is not None
            and fractions[-1] == 1
            and isinstance(direction, Direction)
        ):
            controls = _controls(
                loaded,
                direction,
                ids,
                unmodified,
                refusal_tokens,
                logits,
                n_controls,
                others or {},
                seed,
                batch_size,
            )
    return points, controls


def _controls(
    loaded: LoadedModel,
    direction: Direction,
    ids: Mapping[str, Sequence[Sequence[int]]],
    baseline: Tensor,
    refusal_tokens: Sequence[int],
    ablated: Mapping[str, Tensor],
    count: int,
    others: Mapping[int, Tensor],
    seed: int,
    batch_size: int | str,
) -> dict[str, Any]:
    """Where the direction lies among others, of each of which all is removed."""
    activations, layer, position = activations_at(
        loaded, ids["harmless"], direction.layer, direction.position, batch_size
    )
    controls = random_controls(direction, activations, count, seed)
    controls += [Control(LAYERS, vector, at) for at, vector in others.items()]
    vectors = torch.stack([control.vector for control in controls])
    figures = measure_controls(loaded, ids, baseline, refusal_tokens, vectors, None, batch_size)
    means = (
        refusal_score(ablated["harmful"], refusal_tokens).mean(),
        refusal_score(ablated["harmless"], refusal_tokens).mean(),
        kl_divergence(baseline, ablated["harmless"]).mean(),
    )
    real = dict(zip(FIGURES, map(float, means), strict=True))
    return {
        "n": count,
        "seed": seed,
        "covariance_of": {
            "n_prompts": len(activations),
            "layer": layer,
            "position": position,
            "prompts": "harmless test",
        },
        "rows": {"ablate": compared(real, controls, figures, direction.vector.double())},
    }


def _verdicts(
    limits: AnswerLimits,
    answers: Sequence[Sequence[int]],
    phrases: RefusalPhrases,
    longer: str,
) -> tuple[bool | None, ...]:
    """Whether each answer, as token ids, holds a refusal phrase; None for thoughts cut off.

    ``longer`` is the option that lets them end.

    Raises:
        InputError: all are.
    """
    verdicts = tuple(phrases.verdict(limits.read(answer)[1]) for answer in answers)
    known = [verdict for verdict in verdicts if verdict is not None]
    if not known:
        raise InputError(f"no answer comes after the model's thought: raise {longer}")
    if len(known) < len(verdicts):
        log.warning(
            "%d of %d answers are unfinished thoughts, which count for neither side: raise %s",
            len(verdicts) - len(known),
            len(verdicts),
            longer,
        )
    return verdicts


def _counted(verdicts: Sequence[bool | None]) -> tuple[int, int]:
    """How many are refusals, and of how many that is known."""
    known = [verdict for verdict in verdicts if verdict is not None]
    return sum(known), len(known)


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
        check_fit(session.checkpoint, direction, session.settings.model.trust_remote_code)
        chosen = session.settings.evaluate
        prompts, _ = session.draw_test(n_test, used_prompts(records))
        settle_rendering(session, run, extracted_of(session, run))
        loaded, batch_size = session.load_in_memory(), session.settings.model.batch_size
        tokens = _refusal_tokens(session, loaded, prompts, records)
        stage.start_clock()
        means, wanted, others = run / DIRECTIONS, chosen.controls, {}
        if isinstance(direction, DirectionSet):
            wanted = 0
            log.info("fragility: a direction set has no controls, which stand for one direction")
        elif wanted:
            others = other_layers(means, read_extract(run), direction, wanted)
        points, controls = measure(
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
            n_controls=wanted,
            others=others,
            seed=session.settings.model.seed,
        )
        return stage.finish(
            {
                "direction": direction.summary() | {"sha256": hash_file(run / FILE_NAME)},
                **summarise(points, session.settings.model.seed),
                "points": [point.summary(session.settings.model.seed) for point in points],
                "by_prompt": [
                    {
                        "fraction": point.fraction,
                        "bypass_score": point.bypass_scores,
                        "kl_divergence": point.divergences,
                        "refused": point.verdicts,
                    }
                    for point in points
                ],
                "controls": controls,
                "n_prompts": {kind: len(chosen) for kind, chosen in prompts.items()},
                "intervals": share_methods(),
                "bootstrap": bootstrap_settings(session.settings.model.seed),
                "prompts": prompt_keys(prompts),
                "made_from": {
                    "prompts": hash_prompts(prompt_keys(prompts)),
                    "used_prompts": hash_prompts(used_prompts(records)),
                },
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
