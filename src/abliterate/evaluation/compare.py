"""evaluate: what interventions do to refusal and to harmless answers (paper, sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.errors import InputError, UsageError
from abliterate.evaluation.completions import (
    Completion,
    CompletionFile,
    no_scores,
    scores,
    share_changes,
    token_counter,
)
from abliterate.evaluation.intervention_names import check_name
from abliterate.evaluation.progress import CompletionProgress
from abliterate.inference.engine import Change
from abliterate.inference.in_memory import engine_of
from abliterate.inference.thoughts import AnswerLimits, ask
from abliterate.metrics.intervals import bootstrap
from abliterate.metrics.refusal import (
    check_refusal_tokens,
    kl_divergence,
    refusal_score,
)
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat, encode
from abliterate.prompts.sources import Prompt, check_prompts

# What every evaluation has, and the prompts that only answers are made of.
KINDS = ("harmful", "harmless")
BORDERLINE = "borderline"

# Logits that are scored in float64 at once.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Metrics:
    """What the logits at the last prompt token say.

    Attributes:
        harmful: mean refusal metric of the harmful prompts: log-odds that the first token starts a
            refusal (paper, section 2.3 and appendix B).
        harmless: the same of the harmless prompts.
        kl: mean last-token KL(baseline || intervention) on harmless prompts, in nats.
        harmful_ci: bootstrap 95% interval of ``harmful`` over the prompts.
        harmless_ci: the same of ``harmless``.
        kl_ci: the same of ``kl``.
    """

    harmful: float
    harmless: float
    kl: float
    harmful_ci: tuple[float, float]
    harmless_ci: tuple[float, float]
    kl_ci: tuple[float, float]


@dataclass(frozen=True)
class Outcome:
    """What one intervention did.

    Attributes:
        harmful: completions of the harmful test prompts; None if answers were not generated.
        harmless: completions of the harmless ones.
        metrics: from the logits; None if a server answered, which gives none.
        losses: cross-entropy by corpus, as records hold it.
        tasks: lm-eval's figures by task.
        borderline: completions of harmless prompts that look harmful; None if none were asked for.
    """

    harmful: tuple[Completion, ...] | None
    harmless: tuple[Completion, ...] | None
    metrics: Metrics | None
    losses: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, float]]
    borderline: tuple[Completion, ...] | None = None

    def summary(self) -> dict[str, Any]:
        """The figures, without texts."""

        def counted(completions: tuple[Completion, ...] | None) -> dict[str, Any]:
            return no_scores() if completions is None else scores(completions)

        def figures(kind: str, key: str) -> dict[str, Any]:
            names = {key: kind, f"{key}_ci": f"{kind}_ci"}
            return {key: getattr(self.metrics, name, None) for key, name in names.items()}

        over_refusal = {} if self.borderline is None else {BORDERLINE: counted(self.borderline)}
        return {
            "harmful": counted(self.harmful) | figures("harmful", "refusal_metric"),
            "harmless": counted(self.harmless) | figures("harmless", "refusal_metric"),
            **over_refusal,
            **figures("kl", "kl_divergence"),
            "losses": {name: dict(loss) for name, loss in self.losses.items()},
            "tasks": {name: dict(figures) for name, figures in self.tasks.items()},
        }


def change_of(name: str, direction: Direction | DirectionSet | None) -> Change:
    """What an intervention, checked, does to the model."""
    if direction is None or name == "baseline":
        return None
    if isinstance(direction, DirectionSet):
        return direction, None
    if name == "ablate":
        return direction.vector, None
    return (direction.vector if name == "add" else -direction.vector), direction.layer


def check_intervention(name: str, direction: Direction | DirectionSet | None) -> None:
    """Refuse what is no ``baseline``, ``ablate``, ``add`` or ``subtract``.

    Raises:
        UsageError: the name is unknown, or it needs a direction or a source layer it lacks, or one
            direction where there is a set.
    """
    check_name(name, direction)
    if name in ("add", "subtract") and isinstance(direction, DirectionSet):
        raise UsageError(
            f"--intervention {name} needs one direction, and a set holds one for each layer: give "
            "one direction, or --intervention ablate"
        )
    single = direction if isinstance(direction, Direction) else None
    if name in ("add", "subtract") and single is not None and single.layer is None:
        raise UsageError(f"--intervention {name} needs a direction file that records its layer")


def evaluate(
    loaded: LoadedModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    refusal_tokens: Sequence[int],
    direction: Direction | DirectionSet | None = None,
    interventions: Sequence[str] = ("baseline", "ablate", "add"),
    edited: Mapping[str, LoadedModel] | None = None,
    chat: ChatFormat | None = None,
    max_new_tokens: int = 512,
    batch_size: int | str = "auto",
    seed: int = 0,
    borderline: Sequence[Prompt] = (),
) -> dict[str, Outcome]:
    """Greedy completions and scores of test prompts under each intervention.

    Args:
        loaded: the model that is intervened on.
        harmful: harmful test prompts. A text that comes again is answered once and counts again.
        harmless: harmless test prompts.
        refusal_tokens: ids of the first tokens that count as refusing.
        direction: what ``ablate``, ``add`` and ``subtract`` use.
        interventions: which to run, in this order.
        edited: further models to compare, by name (an orthogonalized checkpoint); they see the
            same token ids.
        chat: system message and template variables.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts per forward pass, or ``auto``.
        seed: of the bootstrap of means.
        borderline: harmless prompts that look harmful, whose answers are counted too.

    Returns:
        Outcomes by intervention or name of the edited model.

    Raises:
        InputError: there are no prompts, or an edited model has another vocabulary.
        UsageError: an intervention, a prompt, a refusal token or the length is none.
    """
    check_prompts(harmful=harmful, harmless=harmless)
    if not isinstance(seed, int) or seed < 0:
        raise UsageError(f"the seed must be a whole number from 0 up, not {seed!r}")
    chat = chat or ChatFormat()
    for name in interventions:
        check_intervention(name, direction)
    runs: list[tuple[str, LoadedModel, Change]] = [
        (name, loaded, change_of(name, direction)) for name in interventions
    ]
    runs += [(name, other, None) for name, other in (edited or {}).items()]
    prompts = {"harmful": harmful, "harmless": harmless}
    if borderline:
        check_prompts(borderline=borderline)
        prompts[BORDERLINE] = borderline
    ids = {kind: encode_prompts(loaded, prompts[kind], chat) for kind in prompts}
    scored_ids = {
        kind: ask_prompts(loaded, prompts[kind], chat, batch_size, kind) for kind in KINDS
    }
    harmless_ids = {"harmless": scored_ids["harmless"]}
    unmodified = engine_of(loaded).last_logits(harmless_ids, {"": None}, batch_size)
    baseline = unmodified[""]["harmless"]
    check_refusal_tokens(refusal_tokens, baseline.shape[1])
    outcomes = {}
    for name, subject, change in runs:
        done: dict[str, tuple[Completion, ...]] = {}
        for kind in prompts:
            rows = {prompt.text: row for row, prompt in enumerate(prompts[kind])}
            unique = [ids[kind][row] for row in rows.values()]
            count_tokens = token_counter(lambda: loaded.tokenizer)
            asked = [prompts[kind][row] for row in rows.values()]
            file = CompletionFile(None, asked, "", count_tokens=count_tokens)
            complete(
                subject,
                unique,
                file,
                change=change,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                label=(name, kind),
                chat=chat,
            )
            said = {completion.prompt: completion for completion in file.completions}
            done[kind] = tuple(replace(said[p.text], category=p.category) for p in prompts[kind])
        metrics = measure(subject, scored_ids, baseline, refusal_tokens, change, batch_size, seed)
        outcomes[name] = Outcome(
            done["harmful"], done["harmless"], metrics, {}, {}, done.get(BORDERLINE)
        )
    return outcomes


def encode_prompts(
    loaded: LoadedModel, prompts: Sequence[Prompt], chat: ChatFormat
) -> list[list[int]]:
    """Token ids of each prompt's conversation."""
    return encode(loaded.tokenizer, [prompt.text for prompt in prompts], chat)


def ask_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    chat: ChatFormat,
    batch_size: int | str,
    kind: str,
) -> list[list[int]]:
    """Token ids up to where each answer begins, without prompts whose thought does not end."""
    texts = [prompt.text for prompt in prompts]
    return ask(loaded, texts, chat, batch_size, kind).finished(kind)


def measure(
    subject: LoadedModel,
    ids: Mapping[str, Sequence[Sequence[int]]],
    baseline: Tensor,
    refusal_tokens: Sequence[int],
    change: Change = None,
    batch_size: int | str = "auto",
    seed: int = 0,
) -> Metrics:
    """Refusal metrics and KL of a model under an intervention.

    Args:
        subject: the model.
        ids: token ids of the prompts, by kind.
        baseline: last-token logits ``[n, vocabulary]`` of the unmodified model on harmless prompts.
        refusal_tokens: ids of the first tokens that count as refusing.
        change: the intervention.
        batch_size: prompts per forward pass, or ``auto``.
        seed: of the bootstrap.

    Raises:
        InputError: the model has another vocabulary than the baseline.
    """
    prompts = {kind: ids[kind] for kind in KINDS}
    logits = engine_of(subject).last_logits(prompts, {"": change}, batch_size)[""]
    harmful, harmless = (logits[kind] for kind in KINDS)
    return metrics_of(harmful, harmless, baseline, refusal_tokens, subject.checkpoint.name, seed)


def metrics_of(
    harmful: Tensor,
    harmless: Tensor,
    baseline: Tensor,
    refusal_tokens: Sequence[int],
    name: str,
    seed: int = 0,
) -> Metrics:
    """Refusal metrics and KL from last-token logits ``[prompts, vocabulary]``.

    Args:
        harmful: logits on harmful prompts.
        harmless: logits on harmless prompts.
        baseline: those of the unmodified model on harmless prompts.
        refusal_tokens: ids of the first tokens that count as refusing.
        name: of the model, for the error message.
        seed: of the bootstrap.

    Raises:
        InputError: the model has another vocabulary than the baseline.
    """
    if harmless.shape != baseline.shape:
        raise InputError(
            f"{name} has a vocabulary of {harmless.shape[1]}, the model that it "
            f"is compared with {baseline.shape[1]}: give a checkpoint made from that model"
        )
    size = max(1, _CHUNK // baseline.shape[1])

    def mean(score: Callable[..., Tensor], *logits: Tensor) -> tuple[float, tuple[float, float]]:
        # Some rows at a time: the scores take float64 copies of what they look at.
        parts = [score(*rows) for rows in zip(*(torch.split(t, size) for t in logits), strict=True)]
        values = torch.cat(parts)
        return float(values.mean()), bootstrap(values.tolist(), seed)

    def refusal(rows: Tensor) -> Tensor:
        return refusal_score(rows, refusal_tokens)

    (on_harmful, harmful_ci), (on_harmless, harmless_ci), (kl, kl_ci) = (
        mean(refusal, harmful),
        mean(refusal, harmless),
        mean(kl_divergence, baseline, harmless),
    )
    return Metrics(on_harmful, on_harmless, kl, harmful_ci, harmless_ci, kl_ci)


def complete(
    subject: LoadedModel,
    ids: Sequence[Sequence[int]],
    file: CompletionFile,
    *,
    change: Change = None,
    max_new_tokens: int = 512,
    batch_size: int | str = "auto",
    label: tuple[str, str] = ("", ""),
    chat: ChatFormat | None = None,
    begun: bool | None = None,
) -> None:
    """Complete the prompts of ``file`` that have no completion yet, each up to its end of turn.

    Args:
        subject: model and tokenizer.
        ids: token ids of the file's prompts.
        file: what gets each completion as soon as it ends.
        change: the intervention.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts per batch, or ``auto``.
        label: intervention and kind, for the progress bar and the log.
        chat: how the prompts were formatted.
        begun: the prompts end within a thought; None if the model's own template says so.
    """
    progress = CompletionProgress(file, label)
    limits = AnswerLimits.of(subject, chat or ChatFormat(), ids, max_new_tokens, begun)

    def answered(row: int, answer: list[int]) -> str:
        return progress.put(row, *limits.read(answer))

    if progress.left:
        engine, about = engine_of(subject), progress.description
        with engine.in_memory(change=change), file.writing():
            engine.answers(ids, limits.longest, batch_size, about, answered, progress.done, chat)
    progress.finish()


def deltas(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Each intervention's figures less the baseline's; empty without a baseline.

    Shares are compared prompt by prompt: see :func:`share_changes`.
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
    now, before = outcome.summary(), baseline.summary()
    of_kinds = {
        kind: share_changes(getattr(outcome, kind), getattr(baseline, kind))
        | {"refusal_metric": _less(now[kind]["refusal_metric"], before[kind]["refusal_metric"])}
        for kind in KINDS
    }
    if outcome.borderline is not None:
        of_kinds[BORDERLINE] = share_changes(outcome.borderline, baseline.borderline)
    return of_kinds | {
        "kl_divergence": _less(now["kl_divergence"], before["kl_divergence"]),
        "losses": {
            corpus: {
                key: _less(loss[key], before["losses"][corpus][key])
                for key in ("loss", "perplexity")
            }
            for corpus, loss in now["losses"].items()
        },
        "tasks": {
            task: {
                key: _less(value, before["tasks"].get(task, {}).get(key))
                for key, value in figures.items()
                if "," in key and "_stderr," not in key
            }
            for task, figures in now["tasks"].items()
        },
    }


def _less(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other
