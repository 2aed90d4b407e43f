"""What interventions did, prompt by prompt, and the figures that records make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import Any

from abliterate.evaluation.completion import Completion
from abliterate.evaluation.completion_rates import (
    no_scores,
    scores,
    share_changes,
)
from abliterate.evaluation.losses import Loss
from abliterate.evaluation.prompt_kinds import BORDERLINE, KINDS
from abliterate.metrics.intervals import bootstrap
from abliterate.metrics.spread import described, described_change
from abliterate.prompts.sampling import prompt_key

# What every evaluation has, and the prompts that only answers are made of.
_OF_KIND = {
    "harmful": ("harmful_scores",),
    "harmless": ("harmless_scores", "divergences", "exact_divergences"),
}


@dataclass(frozen=True)
class Metrics:
    """What the logits at the last prompt token say, one figure per prompt, in their order.

    Attributes:
        harmful_scores: refusal metrics of the harmful prompts: log-odds that the first token starts
            a refusal (paper, section 2.3 and appendix B).
        harmless_scores: the same of the harmless prompts.
        divergences: last-token KL(baseline || intervention) of the harmless prompts, in nats, with
            the paper's epsilon inside the logarithms.
        exact_divergences: the same without it.
        seed: of the bootstrap of their means.
    """

    harmful_scores: tuple[float, ...]
    harmless_scores: tuple[float, ...]
    divergences: tuple[float, ...]
    exact_divergences: tuple[float, ...]
    seed: int = 0

    @property
    def harmful(self) -> float:
        """Mean refusal metric of the harmful prompts."""
        return _mean(self.harmful_scores)

    @property
    def harmless(self) -> float:
        """Mean refusal metric of the harmless prompts."""
        return _mean(self.harmless_scores)

    @property
    def kl(self) -> float:
        """Mean KL of the harmless prompts, in nats."""
        return _mean(self.divergences)

    @cached_property
    def harmful_ci(self) -> tuple[float, float]:
        """Bootstrap 95% interval of ``harmful`` over the prompts."""
        return bootstrap(self.harmful_scores, self.seed)

    @cached_property
    def harmless_ci(self) -> tuple[float, float]:
        """The same of ``harmless``."""
        return bootstrap(self.harmless_scores, self.seed)

    @cached_property
    def kl_ci(self) -> tuple[float, float]:
        """The same of ``kl``."""
        return bootstrap(self.divergences, self.seed)

    def of_kind(self, kind: str) -> dict[str, tuple[float, ...]]:
        """The figures of each prompt of a kind, by their names in records."""
        if kind == "harmful":
            return {"refusal_metric": self.harmful_scores}
        return {
            "refusal_metric": self.harmless_scores,
            "kl_divergence": self.divergences,
            "kl_exact": self.exact_divergences,
        }


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Outcome:
    """What one intervention did.

    Attributes:
        harmful: completions of the harmful test prompts; None if answers were not generated.
        harmless: completions of the harmless ones.
        metrics: from the logits; None if a server answered, which gives none.
        losses: cross-entropy by corpus.
        tasks: lm-eval's figures by task.
        borderline: completions of harmless prompts that look harmful; None if none were asked for.
        seed: of the bootstraps.
        sets: where a kind of prompts has several sources, the keys of each one's prompts.
        scored: by kind the keys of the prompts whose first tokens were scored, in their order.
        controls: what directions that mean nothing do; None where none were tried. Records of
            ``evaluate`` hold them beside the rows.
    """

    harmful: tuple[Completion, ...] | None
    harmless: tuple[Completion, ...] | None
    metrics: Metrics | None
    losses: Mapping[str, Loss]
    tasks: Mapping[str, Mapping[str, float]]
    borderline: tuple[Completion, ...] | None = None
    seed: int = 0
    sets: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    scored: Mapping[str, Sequence[str]] = field(default_factory=dict)
    controls: Mapping[str, Any] | None = None

    def of_set(self, kind: str, source: str) -> Outcome:
        """The same of the prompts of one source of a kind alone; no losses and benchmarks."""
        keys = set(self.sets[kind][source])
        completions = getattr(self, kind)
        chosen = completions and tuple(c for c in completions if prompt_key(c.prompt) in keys)
        metrics = self.metrics
        if metrics is not None:
            rows = [key in keys for key in self.scored[kind]]
            held: dict[str, Any] = {
                name: tuple(compress(getattr(metrics, name), rows)) for name in _OF_KIND[kind]
            }
            metrics = replace(metrics, **held)
        part = replace(self, metrics=metrics, losses={}, tasks={}, sets={}, scored={})
        return (
            replace(part, harmful=chosen) if kind == "harmful" else replace(part, harmless=chosen)
        )

    def _by_set(self, kind: str) -> dict[str, Any]:
        """The figures of each source of a kind; empty where there is one alone."""
        if kind not in self.sets:
            return {}
        found = {}
        for source in self.sets[kind]:
            figures = self.of_set(kind, source).summary()
            divergences = ("kl_divergence", "kl_exact") if kind == "harmless" else ()
            names = [f"{name}{more}" for name in divergences for more in ("", "_ci", "_spread")]
            found[source] = figures[kind] | {name: figures[name] for name in names}
        return {"sets": found}

    def values(self, kind: str, name: str) -> tuple[float, ...] | None:
        """A figure of each prompt of a kind; None where there are no logits."""
        return None if self.metrics is None else self.metrics.of_kind(kind)[name]

    def summary(self) -> dict[str, Any]:
        """The figures, without texts."""

        def counted(completions: tuple[Completion, ...] | None) -> dict[str, Any]:
            return no_scores() if completions is None else scores(completions)

        def figures(kind: str, name: str) -> dict[str, Any]:
            return described(name, self.values(kind, name), self.seed)

        over_refusal = {} if self.borderline is None else {BORDERLINE: counted(self.borderline)}
        return {
            "harmful": counted(self.harmful)
            | figures("harmful", "refusal_metric")
            | self._by_set("harmful"),
            "harmless": counted(self.harmless)
            | figures("harmless", "refusal_metric")
            | self._by_set("harmless"),
            **over_refusal,
            **figures("harmless", "kl_divergence"),
            **figures("harmless", "kl_exact"),
            "losses": {name: loss.summary(self.seed) for name, loss in self.losses.items()},
            "tasks": {name: dict(figures) for name, figures in self.tasks.items()},
        }

    def by_prompt(self) -> dict[str, Any]:
        """The figures of each prompt, and the loss of each text of the corpora."""
        metrics = self.metrics
        return {
            **({} if metrics is None else {kind: metrics.of_kind(kind) for kind in KINDS}),
            "losses": {name: loss.by_text() for name, loss in self.losses.items()},
        }


def deltas(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Each intervention's figures less the baseline's; empty without a baseline.

    All are compared prompt by prompt: shares as :func:`share_changes` has it, means by the
    differences of the same prompts.
    """
    if "baseline" not in outcomes:
        return {}
    baseline = outcomes["baseline"]
    return {
        name: _changes(outcome, baseline)
        for name, outcome in outcomes.items()
        if name != "baseline"
    }


def _changes(outcome: Outcome, baseline: Outcome) -> dict[str, Any]:
    def means(kind: str, name: str) -> dict[str, Any]:
        now, before = outcome.values(kind, name), baseline.values(kind, name)
        return described_change(name, now, before, outcome.seed)

    of_kinds = {
        kind: share_changes(getattr(outcome, kind), getattr(baseline, kind))
        | means(kind, "refusal_metric")
        for kind in KINDS
    }
    for kind, sources in outcome.sets.items():
        of_kinds[kind]["sets"] = {
            source: _changes(outcome.of_set(kind, source), baseline.of_set(kind, source))[kind]
            for source in sources
        }
    if outcome.borderline is not None:
        of_kinds[BORDERLINE] = share_changes(outcome.borderline, baseline.borderline)
    return of_kinds | {
        **means("harmless", "kl_divergence"),
        **means("harmless", "kl_exact"),
        "losses": {
            corpus: loss.less(baseline.losses[corpus], outcome.seed)
            for corpus, loss in outcome.losses.items()
        },
        "tasks": {
            task: {
                key: _less(value, baseline.tasks.get(task, {}).get(key))
                for key, value in figures.items()
                if "," in key and "_stderr," not in key
            }
            for task, figures in outcome.tasks.items()
        },
    }


def _less(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other
