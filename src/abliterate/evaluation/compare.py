"""evaluate: what interventions do to refusal and to harmless answers (paper, sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.errors import InputError, UsageError
from abliterate.evaluation.changes import change_of, check_intervention
from abliterate.evaluation.completion import Completion, token_counter
from abliterate.evaluation.completions import CompletionFile
from abliterate.evaluation.controls import CONTROLLED
from abliterate.evaluation.controls import measure as measure_controls
from abliterate.evaluation.first_tokens import Answering, FirstTokenLogits
from abliterate.evaluation.outcomes import Metrics, Outcome
from abliterate.evaluation.progress import CompletionProgress
from abliterate.evaluation.prompt_kinds import BORDERLINE, KINDS
from abliterate.inference.control_directions import activations_at
from abliterate.inference.engine import Change, OnFirstLogits
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
from abliterate.prompts.thinking import find_thinking

# Logits that are scored in float64 at once.
_CHUNK = 1 << 22


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
    controls: int = 0,
    stop_at_verdict: bool = False,
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
        controls: how many random directions of each family are tried beside a direction.
        stop_at_verdict: an answer ends once it holds a refusal phrase.

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
    others = edited or {}
    prompts = {"harmful": harmful, "harmless": harmless}
    if borderline:
        check_prompts(borderline=borderline)
        prompts[BORDERLINE] = borderline
    ids = {kind: encode_prompts(loaded, prompts[kind], chat) for kind in prompts}
    rows = {kind: {p.text: row for row, p in enumerate(chosen)} for kind, chosen in prompts.items()}
    unique = {kind: [ids[kind][row] for row in rows[kind].values()] for kind in prompts}
    scored_ids: dict[str, list[list[int]]] = {kind: unique[kind] for kind in KINDS}
    places = {kind: _places(prompts[kind], list(rows[kind])) for kind in KINDS}
    answering: Answering | None = Answering(chat, max_new_tokens)
    if find_thinking(loaded.tokenizer, chat).mode == "skip":
        for kind in KINDS:
            scored_ids[kind] = ask_prompts(loaded, prompts[kind], chat, batch_size, kind).finished(
                kind
            )
            places[kind] = list(range(len(scored_ids[kind])))
        answering = None
    first = FirstTokenLogits(
        lambda name: others.get(name, loaded),
        [name for name in interventions if name not in others],
        direction,
        scored_ids,
        batch_size,
        answering,
    )
    vocabulary = first.of("baseline", ["harmless"], 1)["harmless"].shape[1]
    check_refusal_tokens(refusal_tokens, vocabulary)
    outcomes = {}
    # The baseline first: KL is measured from where its answers start.
    for name in [*sorted(interventions, key=lambda name: name != "baseline"), *others]:
        subject = others.get(name, loaded)
        done: dict[str, tuple[Completion, ...]] = {}
        for kind in prompts:
            asked = [prompts[kind][row] for row in rows[kind].values()]
            count_tokens = token_counter(lambda: loaded.tokenizer)
            file = CompletionFile(None, asked, "", count_tokens=count_tokens)
            complete(
                subject,
                unique[kind],
                file,
                change=None if name in others else change_of(name, direction),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                label=(name, kind),
                chat=chat,
                stop_at_verdict=stop_at_verdict,
                on_first=first.taking(name, kind),
            )
            said = {completion.prompt: completion for completion in file.completions}
            done[kind] = tuple(replace(said[p.text], category=p.category) for p in prompts[kind])
        baseline = first.of("baseline", ["harmless"])["harmless"][places["harmless"]]
        seen = {kind: logits[places[kind]] for kind, logits in first.of(name).items()}
        if name != "baseline":
            first.forget(name)
        model = subject.checkpoint.name
        metrics = metrics_of(
            seen["harmful"], seen["harmless"], baseline, refusal_tokens, model, seed
        )
        outcomes[name] = Outcome(
            done["harmful"], done["harmless"], metrics, {}, {}, done.get(BORDERLINE), seed
        )
        if controls and name in CONTROLLED and isinstance(direction, Direction):
            scored = {kind: [scored_ids[kind][row] for row in places[kind]] for kind in KINDS}
            activations, _, _ = activations_at(
                loaded, scored["harmless"], direction.layer, direction.position, batch_size
            )
            tried = measure_controls(
                loaded, name, direction, {}, activations, controls, seed, scored, baseline,
                list(refusal_tokens), metrics, batch_size,
            )  # fmt: skip
            outcomes[name] = replace(outcomes[name], controls=tried)
    return {name: outcomes[name] for name in [*interventions, *others]}


def _places(prompts: Sequence[Prompt], unique: Sequence[str]) -> list[int]:
    """Where each prompt's text is among the different ones."""
    place = {text: at for at, text in enumerate(unique)}
    return [place[prompt.text] for prompt in prompts]


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
    on_first: OnFirstLogits | None = None,
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
        on_first: takes the logits that answers start from, of all prompts if any is left.
    """
    progress = CompletionProgress(file, label)
    limits = AnswerLimits.of(subject, chat or ChatFormat(), ids, max_new_tokens, begun)

    def answered(row: int, answer: list[int]) -> str:
        return progress.put(row, *limits.read(answer))

    def refused(answer: list[int]) -> bool:
        text, parts = limits.read(answer)
        return file.phrases.verdict(parts) is True and not limits.reader.goes_on(text)

    if progress.left:
        engine, about = engine_of(subject), progress.description
        with engine.in_memory(change=change), file.writing():
            engine.answers(
                ids, limits.longest, batch_size, about, answered, progress.done, chat,
                settled=refused if stop_at_verdict else None, on_first=on_first,
            )  # fmt: skip
    progress.finish()
