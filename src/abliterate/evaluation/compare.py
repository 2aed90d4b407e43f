"""evaluate: what interventions do to refusal and to harmless answers (paper, sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.errors import InputError, UsageError
from abliterate.evaluation.completions import (
    Completion,
    CompletionFile,
    token_counter,
)
from abliterate.evaluation.intervention_names import check_name
from abliterate.evaluation.outcomes import BORDERLINE, KINDS, Metrics, Outcome
from abliterate.evaluation.progress import CompletionProgress
from abliterate.inference.engine import Change
from abliterate.inference.in_memory import engine_of
from abliterate.inference.thoughts import AnswerLimits, Asked, ask
from abliterate.metrics.refusal import (
    check_refusal_tokens,
    exact_kl,
    kl_divergence,
    refusal_score,
)
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat, encode
from abliterate.prompts.sources import Prompt, check_prompts

# Logits that are scored in float64 at once.
_CHUNK = 1 << 22


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
        kind: ask_prompts(loaded, prompts[kind], chat, batch_size, kind).finished(kind)
        for kind in KINDS
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
            done["harmful"], done["harmless"], metrics, {}, {}, done.get(BORDERLINE), seed
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
) -> Asked:
    """Token ids up to where each answer begins, and which prompts' thoughts have ended."""
    return ask(loaded, [prompt.text for prompt in prompts], chat, batch_size, kind)


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

    def each(score: Callable[..., Tensor], *logits: Tensor) -> tuple[float, ...]:
        # Some rows at a time: the scores take float64 copies of what they look at.
        parts = [score(*rows) for rows in zip(*(torch.split(t, size) for t in logits), strict=True)]
        return tuple(torch.cat(parts).tolist())

    def refusal(rows: Tensor) -> Tensor:
        return refusal_score(rows, refusal_tokens)

    return Metrics(
        each(refusal, harmful),
        each(refusal, harmless),
        each(kl_divergence, baseline, harmless),
        each(exact_kl, baseline, harmless),
        seed,
    )


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
    stop_at_verdict: bool = False,
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
        stop_at_verdict: an answer ends once it holds a refusal phrase, of which no more tokens
            can take anything away.
    """
    progress = CompletionProgress(file, label)
    limits = AnswerLimits.of(subject, chat or ChatFormat(), ids, max_new_tokens, begun)

    def answered(row: int, answer: list[int]) -> str:
        return progress.put(row, *limits.read(answer))

    def refused(answer: list[int]) -> bool:
        return file.phrases.verdict(limits.read(answer)[1]) is True

    if progress.left:
        engine, about = engine_of(subject), progress.description
        with engine.in_memory(change=change), file.writing():
            engine.answers(
                ids, limits.longest, batch_size, about, answered, progress.done, chat,
                settled=refused if stop_at_verdict else None,
            )  # fmt: skip
    progress.finish()
