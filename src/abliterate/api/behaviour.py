"""What interventions do to a model's behaviour: evaluate, fragility."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from abliterate.analysis import fragility as curves
from abliterate.analysis.fragility_curve import Point, summarise
from abliterate.api.directions import texts_as_ids
from abliterate.api.inputs import (
    DirectionLike,
    PromptsLike,
    as_direction,
    as_prompts,
    check_arguments,
)
from abliterate.api.language_model import LanguageModel, ModelLike, as_model
from abliterate.direction import Direction
from abliterate.errors import UsageError
from abliterate.evaluation import compare
from abliterate.evaluation.outcomes import Outcome, deltas
from abliterate.extraction.refusal_token_search import find_refusal_tokens
from abliterate.inference.interventions import check_direction
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.sources import Prompt
from abliterate.result_tables import to_frame, to_html, to_json


@dataclass(frozen=True, repr=False)
class Evaluation(Mapping[str, Outcome]):
    """Outcomes by intervention, or by name of an edited model.

    Attributes:
        outcomes: what each did.
    """

    outcomes: Mapping[str, Outcome]

    def __getitem__(self, name: str) -> Outcome:
        return self.outcomes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outcomes)

    def __len__(self) -> int:
        return len(self.outcomes)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each intervention: refusal scores (shares), refusal metrics (log-odds), KL."""
        rows = []
        for name, outcome in self.outcomes.items():
            figures = outcome.summary()
            row: dict[str, Any] = {"intervention": name}
            for kind in ("harmful", "harmless"):
                row |= {
                    f"{kind}_refused": figures[kind].get("refusal_score"),
                    f"{kind}_refusal_metric": figures[kind]["refusal_metric"],
                }
            rows.append(row | {"kl_divergence": figures["kl_divergence"]})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Every intervention's figures, and what each changes against the baseline; no texts."""
        return to_json(
            {
                "outcomes": {name: outcome.summary() for name, outcome in self.outcomes.items()},
                "deltas": deltas(self.outcomes),
                "controls": {
                    name: outcome.controls
                    for name, outcome in self.outcomes.items()
                    if outcome.controls is not None
                },
            }
        )

    def to_pandas(self) -> Any:
        """:meth:`rows` as a DataFrame."""
        return to_frame(self.rows())

    def __repr__(self) -> str:
        return f"Evaluation({', '.join(self.outcomes)})"

    def _repr_html_(self) -> str:
        return to_html("evaluation", self.rows())


def evaluate(
    model: ModelLike,
    harmful: PromptsLike,
    harmless: PromptsLike,
    refusal_tokens: Sequence[int] | None = None,
    direction: DirectionLike | None = None,
    interventions: Sequence[str] | None = None,
    edited: Mapping[str, ModelLike] | None = None,
    chat: ChatFormat | None = None,
    max_new_tokens: int = 512,
    batch_size: int | str | None = None,
    seed: int = 0,
    borderline: PromptsLike = (),
    *,
    controls: int = 0,
    stop_at_verdict: bool = False,
) -> Evaluation:
    """Greedy answers and scores of test prompts under each intervention.

    Args:
        model: the model, in memory.
        harmful: harmful test prompts; of a source its test split.
        harmless: harmless test prompts.
        refusal_tokens: ids of first tokens that count as refusing, such as
            ``extraction.refusal_tokens``; None to find them from the model.
        direction: what ``ablate``, ``add`` and ``subtract`` use.
        interventions: which to run; None for baseline, ablate and add, without a direction for the
            baseline alone.
        edited: further models to compare, by name; they see the same tokens.
        chat: how prompts become conversations; None for the model's.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts per forward pass; None for the model's.
        seed: of the bootstrap of means.
        borderline: harmless prompts that look harmful, whose answers are counted too.
        controls: how many random directions of each family are tried beside ``ablate``, ``add``
            and ``subtract``.
        stop_at_verdict: an answer ends once it holds a refusal phrase.

    Returns:
        Outcomes by intervention: answers, refusal scores with intervals, KL in nats.

    Raises:
        InputError: there are no prompts, or an edited model has another vocabulary.
        UsageError: an intervention, a refusal token or the length is none.

    Source:
        Sections 3.1 and 3.2; the refusal metric is of section 2.3.

    Examples:
        >>> found = ab.evaluate(lm, harmful_val[:4], harmless_val[:4], ex.refusal_tokens, d,
        ...                     max_new_tokens=8)
        >>> list(found)
        ['baseline', 'ablate', 'add']
        >>> found["baseline"].metrics.harmful > found["ablate"].metrics.harmful
        True
    """
    lm = as_model(model)
    check_arguments(
        interventions=interventions,
        edited=edited,
        chat=chat,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        controls=controls,
        stop_at_verdict=stop_at_verdict,
    )
    along = None if direction is None else as_direction(direction)
    if along is not None:
        check_direction(along.vector, lm.d_model)
    prompts = as_prompts(harmful, "harmful", "test"), as_prompts(harmless, "harmless", "test")
    names = interventions
    if names is None:
        names = ("baseline",) if along is None else ("baseline", "ablate", "add")
    outcomes = compare.evaluate(
        lm.loaded,
        *prompts,
        _tokens(lm, *prompts, refusal_tokens),
        along,
        names,
        {name: as_model(other).loaded for name, other in (edited or {}).items()},
        chat or lm.chat,
        max_new_tokens,
        lm.batch_size if batch_size is None else batch_size,
        seed,
        () if borderline == () else as_prompts(borderline, "borderline", "test"),
        controls,
        stop_at_verdict,
    )
    return Evaluation(outcomes)


def _tokens(
    lm: LanguageModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    given: Sequence[int] | None,
) -> list[int]:
    """Refusal tokens, found from the model's own first tokens where none are given."""
    if given is not None:
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise UsageError(f"the refusal tokens must be a list of token ids, not {given!r:.60}")
        return list(given)
    ids = texts_as_ids(lm, harmful, "harmful"), texts_as_ids(lm, harmless, "harmless")
    return find_refusal_tokens(lm.loaded, *ids, (), lm.batch_size)


@dataclass(frozen=True, repr=False)
class Fragility:
    """How much of refusal hangs on one direction.

    Attributes:
        points: refusal and KL at each fraction of the direction that is removed.
        fragility: mean share of refusals that is lost on the way, 0 to 1; None if nothing is
            refused to begin with.
        half_fraction: where half of the refusals are gone; None if never.
        kl_at_half: the KL there, in nats.
        remaining: share of refusals that is left once all is removed.
        direction: which.
    """

    points: tuple[Point, ...]
    fragility: float | None
    half_fraction: float | None
    kl_at_half: float | None
    remaining: float | None
    direction: Direction

    def to_dict(self) -> dict[str, Any]:
        """All of it, as ``fragility.json`` names it."""
        return to_json(
            {
                "direction": self.direction.summary(),
                "fragility": self.fragility,
                "half_fraction": self.half_fraction,
                "kl_at_half": self.kl_at_half,
                "remaining": self.remaining,
                "points": [asdict(point) for point in self.points],
            }
        )

    def to_pandas(self) -> Any:
        """A row for each fraction."""
        return to_frame([asdict(point) for point in self.points])

    def __repr__(self) -> str:
        number = "none refused" if self.fragility is None else f"{self.fragility:z.3f}"
        return f"Fragility({number}, {len(self.points)} fractions)"

    def _repr_html_(self) -> str:
        heads = ("fraction", "refusal_rate", "bypass_score", "kl_divergence")
        rows = [{head: getattr(point, head) for head in heads} for point in self.points]
        return to_html(repr(self), rows)


def fragility(
    model: ModelLike,
    direction: DirectionLike,
    harmful: PromptsLike,
    harmless: PromptsLike,
    refusal_tokens: Sequence[int] | None = None,
    *,
    steps: int = 11,
    max_new_tokens: int = 64,
) -> Fragility:
    """Remove a direction by and by, and see when refusal goes.

    Args:
        model: the model, in memory.
        direction: a direction or its vector ``[d_model]``.
        harmful: harmful test prompts; of a source its test split.
        harmless: harmless test prompts.
        refusal_tokens: ids of first tokens that count as refusing; None to find them.
        steps: fractions from 0 to 1, at least 2.
        max_new_tokens: longest answer, in tokens.

    Returns:
        The curve and its numbers.

    Raises:
        InputError: the direction does not fit, or there are no prompts.
        UsageError: there are too few steps, or the model is streamed.

    Source:
        Section 2.4 at part strength: ``c <- c - s (c . r) r``.

    Examples:
        >>> curve = ab.fragility(lm, d, harmful_val[:2], harmless_val[:2], ex.refusal_tokens,
        ...                      steps=2, max_new_tokens=8)
        >>> [point.fraction for point in curve.points]
        [0.0, 1.0]
    """
    check_arguments(max_new_tokens=max_new_tokens)
    if not isinstance(steps, int) or steps < 2:
        raise UsageError(f"--steps must be at least 2, not {steps!r}")
    lm, along = as_model(model), as_direction(direction)
    prompts = as_prompts(harmful, "harmful", "test"), as_prompts(harmless, "harmless", "test")
    points, _ = curves.measure(
        lm.loaded,
        along,
        *prompts,
        _tokens(lm, *prompts, refusal_tokens),
        [step / (steps - 1) for step in range(steps)],
        chat=lm.chat,
        max_new_tokens=max_new_tokens,
        batch_size=lm.batch_size,
    )
    found = summarise(points)
    names = ("fragility", "half_fraction", "kl_at_half", "remaining")
    return Fragility(tuple(points), **{name: found[name] for name in names}, direction=along)
