"""extract: mean ``resid_pre`` over harmful and over harmless prompts (paper, section 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.console import log
from abliterate.distributed.rank_group import ALONE, RankGroup
from abliterate.errors import InputError
from abliterate.inference.forward import (
    Batch,
    capture_resid_pre,
    for_each_batch,
    last_logits,
    logits_needed,
)
from abliterate.metrics.refusal import detect_refusal_tokens, refusal_score, resolve_refusal_tokens
from abliterate.models.loading import LoadedModel, require_token
from abliterate.prompts.chat_template import ChatFormat, encode, parse_positions, position_tokens
from abliterate.prompts.sources import Prompt, check_prompts
from abliterate.storage.artifacts import read_tensors
from abliterate.writers import decoder_blocks, find_writers, stream_width

# How many prompts of each kind the refusal tokens are detected from.
_DETECT_PROMPTS = 32
# Of a streamed model's activations, which may lie in a mapped file, so many prompts at a time.
_SEEN_ROWS = 16
# Fewer prompts than this make a mean that is mostly noise.
_MIN_PROMPTS = 8

Kept = tuple[bool, ...]
# Called with a kind of prompt, its rows, and their ``[batch, n_positions, n_layers, d_model]``.
Keep = Callable[[str, Sequence[int], Tensor], None]


@dataclass(frozen=True)
class Extraction:
    """Mean activations at each position and layer.

    Attributes:
        mean_harmful: float64 ``[n_positions, n_layers, d_model]``.
        mean_harmless: the same over harmless prompts.
        positions: ascending positions counted from the prompt's end (-1 is its last token).
        tokens: the template's token at each position.
        refusal_tokens: ids of the first tokens that count as refusing.
        kept_harmful: for each prompt given, whether its activations were used.
        kept_harmless: the same for the harmless prompts.
    """

    mean_harmful: Tensor
    mean_harmless: Tensor
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    refusal_tokens: tuple[int, ...]
    kept_harmful: Kept = ()
    kept_harmless: Kept = ()

    @property
    def directions(self) -> Tensor:
        """The candidates, ``mean_harmful - mean_harmless``."""
        return self.mean_harmful - self.mean_harmless

    def check(self, n_layers: int, d_model: int) -> None:
        """Refuse means that are not of a model with so many blocks of that width.

        Raises:
            InputError: their shape or number of positions is another.
        """
        expected = (len(self.positions), n_layers, d_model)
        for name, mean in (("harmful", self.mean_harmful), ("harmless", self.mean_harmless)):
            if tuple(mean.shape) != expected:
                raise InputError(
                    f"the mean of the {name} prompts has shape {list(mean.shape)}, the model and "
                    f"its positions need {list(expected)}: extract from this model again"
                )

    @classmethod
    def load(cls, tensors: Path, record: Mapping[str, Any]) -> Extraction:
        """What ``extract`` wrote to ``directions.safetensors`` and ``extract.json``.

        Raises:
            InputError: the two do not belong together.
        """
        means = read_tensors(tensors, "mean_harmful", "mean_harmless")
        wanted = len(record["positions"]), record["n_layers"]
        shapes = {tuple(mean.shape) for mean in means.values()}
        if len(shapes) > 1 or any(len(s) != 3 or s[:2] != wanted or not s[2] for s in shapes):
            found = " and ".join(str(list(mean.shape)) for mean in means.values())
            raise InputError(
                f"{tensors} holds means of {found}, extract.json says {wanted[0]} positions of "
                f"{wanted[1]} layers: run extract again"
            )
        return cls(
            means["mean_harmful"],
            means["mean_harmless"],
            tuple(entry["position"] for entry in record["positions"]),
            tuple(entry["token"] for entry in record["positions"]),
            tuple(entry["id"] for entry in record["refusal_tokens"]),
        )


def extract(
    loaded: LoadedModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    positions: str = "post-instruction",
    refusal_tokens: Sequence[str] = (),
    filter: bool = True,
    chat: ChatFormat | None = None,
    batch_size: int | str = "auto",
    keep: Keep | None = None,
) -> Extraction:
    """Candidate refusal directions: difference of means at every position and layer.

    Args:
        loaded: model and tokenizer.
        harmful: training prompts that the model should refuse.
        harmless: training prompts that it should answer.
        positions: ``post-instruction``, ``last`` or a list such as ``-5,-1``.
        refusal_tokens: token strings, ids or preset names; detected from the model if empty.
        filter: drop harmful prompts that are not refused and harmless ones that are.
        chat: system message and template variables.
        batch_size: prompts per forward pass, or ``auto``.
        keep: called with the activations of every prompt, batch by batch.

    Raises:
        InputError: there are too few prompts, or too few are left, or one is shorter than a
            position.
        UsageError: a position or refusal token does not exist.
    """
    check_prompts(harmful=harmful, harmless=harmless)
    chat = chat or ChatFormat()
    model, tokenizer = loaded.model, loaded.tokenizer
    where = parse_positions(positions, tokenizer, chat)
    harmful_ids = encode(tokenizer, [prompt.text for prompt in harmful], chat)
    harmless_ids = encode(tokenizer, [prompt.text for prompt in harmless], chat)
    shortest = min(map(len, (*harmful_ids, *harmless_ids)))
    if shortest < -where[0]:
        raise InputError(
            f"position {where[0]} lies before the start of a prompt of {shortest} "
            "tokens: pass later --positions"
        )
    ranks = loaded.ranks
    given = {"harmful": ranks.split(harmful_ids), "harmless": ranks.split(harmless_ids)}
    # What the refusal tokens are detected from is not run again for the means.
    seen: dict[str, list[BatchActivations]] = {kind: [] for kind in given}
    if loaded.stream is not None:
        seen = _look_together(loaded.stream, given, where, batch_size)
    if refusal_tokens:
        tokens = named_refusal_tokens(loaded, refusal_tokens)
    elif loaded.stream is not None:
        tokens = detect_refusal_tokens(
            *(
                _summed_probabilities(seen[kind][: _DETECT_PROMPTS // _SEEN_ROWS])
                / min(_DETECT_PROMPTS, len(rows))
                for kind, rows in given.items()
            )
        )
    else:
        first = len(ranks.split(range(_DETECT_PROMPTS)))
        with ranks.fail_together():
            for kind, rows in given.items():
                sample = rows[:first]
                collect_activations(
                    model, sample, where, seen[kind].append, batch_size, f"extract: {kind}"
                )
        tokens = detect_refusal_tokens(
            *(
                _summed(ranks.all_gather(_summed_probabilities(seen[kind])))
                / min(_DETECT_PROMPTS, n)
                for kind, n in (("harmful", len(harmful_ids)), ("harmless", len(harmless_ids)))
            )
        )

    def mean(kind: str, sign: float) -> tuple[Tensor, Kept]:
        result, kept = mean_resid_pre(
            model,
            given[kind],
            where,
            tokens if filter else None,
            sign,
            batch_size,
            f"extract: {kind}",
            seen[kind],
            keep and partial(keep, kind),
            ranks,
        )
        if filter:
            require_min_prompts(kind, sum(kept), len(kept), "n-train")
        return result, kept

    mean_harmful, kept_harmful = mean("harmful", 1.0)
    mean_harmless, kept_harmless = mean("harmless", -1.0)
    return Extraction(
        mean_harmful,
        mean_harmless,
        where,
        tuple(position_tokens(tokenizer, where, chat)),
        tuple(tokens),
        kept_harmful,
        kept_harmless,
    )


def _look_together(
    stream: Any,
    given: Mapping[str, Sequence[Sequence[int]]],
    positions: Sequence[int],
    batch_size: int | str,
) -> dict[str, list[BatchActivations]]:
    """All prompts of every kind in one reading of a streamed model."""
    from abliterate.offload.weight_passes import look as look_streamed

    everything = [ids for rows in given.values() for ids in rows]
    logits, activations = look_streamed(stream, everything, positions, batch_size)
    seen: dict[str, list[BatchActivations]] = {}
    start = 0
    for kind, rows in given.items():
        seen[kind] = []
        for first in range(0, len(rows), _SEEN_ROWS):
            part = tuple(range(first, min(first + _SEEN_ROWS, len(rows))))
            at = slice(start + first, start + first + len(part))
            seen[kind].append(BatchActivations(part, logits[at], activations[at]))
        start += len(rows)
    return seen


def find_refusal_tokens(
    loaded: LoadedModel,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    names: Sequence[str],
    batch_size: int | str = "auto",
) -> list[int]:
    """The refusal tokens named, or those that the model's own first tokens show.

    Args:
        loaded: model and tokenizer.
        harmful: token ids of harmful prompts; the first 32 are looked at.
        harmless: token ids of harmless prompts.
        names: as ``--refusal-token`` gives them; empty to detect.
        batch_size: prompts per forward pass, or ``auto``.
    """
    if names:
        return named_refusal_tokens(loaded, names)
    if loaded.stream is not None:
        from abliterate.offload.streamed_interventions import logits_under

        both = [*harmful[:_DETECT_PROMPTS], *harmless[:_DETECT_PROMPTS]]
        logits = logits_under(loaded.stream, both, {"": None}, batch_size, "refusal tokens")[""]
        n = len(harmful[:_DETECT_PROMPTS])
        return refusal_tokens_shown(logits[:n], logits[n:])
    means = []
    for rows in (harmful, harmless):
        sample = rows[:_DETECT_PROMPTS]
        total, ranks = torch.zeros(1, dtype=torch.float64), loaded.ranks

        def collect(batch: Batch) -> None:
            nonlocal total
            probabilities = last_logits(loaded.model, batch).double().softmax(-1)
            total = total + probabilities.sum(0).cpu()

        with ranks.fail_together(), torch.inference_mode():
            own = ranks.split(sample)
            for_each_batch(loaded.model, own, collect, batch_size, "refusal tokens")
        means.append(_summed(ranks.all_gather(total)) / len(sample))
    return detect_refusal_tokens(*means)


def named_refusal_tokens(loaded: LoadedModel, names: Sequence[str]) -> list[int]:
    """The refusal tokens that ``--refusal-token`` names.

    Raises:
        CheckpointError: the model has no logit for one.
        UsageError: a value is not a single token of the tokenizer.
    """
    tokens = resolve_refusal_tokens(loaded.tokenizer, names)
    for token in tokens:
        require_token(loaded.model, token, "--refusal-token")
    return tokens


def refusal_tokens_shown(harmful: Tensor, harmless: Tensor) -> list[int]:
    """The refusal tokens that last-token logits ``[prompts, vocabulary]`` show; 32 rows count."""
    return detect_refusal_tokens(
        *(
            # Row by row: a float64 copy of all would be larger than what is looked at.
            _summed(row.double().softmax(-1) for row in rows[:_DETECT_PROMPTS])
            / len(rows[:_DETECT_PROMPTS])
            for rows in (harmful, harmless)
        )
    )


@dataclass(frozen=True)
class BatchActivations:
    """One batch's last-token logits and activations.

    Attributes:
        rows: which prompts they are of.
        logits: ``[batch, vocabulary]``.
        activations: ``[batch, n_positions, n_layers, d_model]``.
    """

    rows: tuple[int, ...]
    logits: Tensor
    activations: Tensor


def collect_activations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int],
    use: Callable[[BatchActivations], None],
    batch_size: int | str = "auto",
    description: str = "extract",
) -> None:
    """Run ``prompts`` once and call ``use`` on what each batch shows."""
    needed = logits_needed(model, positions)
    with torch.inference_mode(), capture_resid_pre(model, positions) as captured:

        def run(batch: Batch) -> None:
            logits = last_logits(model, batch, needed)
            last = logits if needed == 1 else logits[:, -1]
            use(BatchActivations(batch.rows, last, captured()))

        for_each_batch(model, prompts, run, batch_size, description)


def _summed_probabilities(seen: Sequence[BatchActivations]) -> Tensor:
    """Summed next-token probabilities, float64 ``[vocabulary]`` on the CPU; ``[1]`` if none."""
    return _summed([one.logits.double().softmax(-1).sum(0).cpu() for one in seen])


def _summed(parts: Iterable[Tensor]) -> Tensor:
    return sum(parts, torch.zeros(1, dtype=torch.float64))


def mean_resid_pre(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int],
    refusal_tokens: Sequence[int] | None = None,
    sign: float = 1.0,
    batch_size: int | str = "auto",
    description: str = "extract",
    seen: Sequence[BatchActivations] = (),
    keep: Callable[[Sequence[int], Tensor], None] | None = None,
    ranks: RankGroup | None = None,
) -> tuple[Tensor, Kept]:
    """Mean ``resid_pre`` over prompts, reduced batch by batch to one float64 sum.

    Args:
        model: the model.
        prompts: token ids; of a team, this rank's share of them.
        positions: where to look, counted from each prompt's end.
        refusal_tokens: if given, only prompts whose refusal score has the sign ``sign`` count.
        sign: +1 keeps refused prompts, -1 keeps answered ones.
        batch_size: prompts per forward pass, or ``auto``.
        description: shown beside the progress bar.
        seen: the first prompts, where they have been run already.
        keep: called with the rows of each batch and their activations.
        ranks: the processes whose prompts make up the mean, by an all-reduce of their sums.

    Returns:
        float64 ``[n_positions, n_layers, d_model]`` on the CPU (NaN if no prompt counts), and for
        each prompt, of all ranks, whether it counts.
    """
    ranks = ranks or ALONE
    shape = len(positions), len(decoder_blocks(model)), stream_width(model, find_writers(model))
    total = torch.zeros(shape, dtype=torch.float64)
    kept = [True] * len(prompts)
    first = sum(len(one.rows) for one in seen)

    def accumulate(one: BatchActivations, offset: int = 0) -> None:
        nonlocal total
        counts = torch.ones(len(one.rows), dtype=torch.bool)
        if refusal_tokens is not None:
            counts = (sign * refusal_score(one.logits, refusal_tokens) > 0).cpu()
        chosen = one.activations[counts.to(one.activations.device)]
        summed = chosen.sum(0, dtype=torch.float64).cpu()
        total += summed
        for row, flag in zip(one.rows, counts.tolist(), strict=True):
            kept[row + offset] = flag
        if keep is not None:
            keep([row + offset for row in one.rows], one.activations)

    with ranks.fail_together():
        for one in seen:
            accumulate(one)
        rest = prompts[first:]
        collect_activations(
            model, rest, positions, lambda one: accumulate(one, first), batch_size, description
        )
    total, kept = ranks.all_reduce_sum(total), ranks.gather(kept)
    return total / sum(kept) if any(kept) else total * float("nan"), tuple(kept)


def require_min_prompts(name: str, kept: int, given: int, option: str) -> None:
    """Refuse to go on with too few prompts after filtering.

    Raises:
        InputError: fewer than 8 (or than were given) are left.
    """
    log.info("%s prompts kept by the filter: %d of %d", name, kept, given)
    if kept >= min(_MIN_PROMPTS, given):
        return
    verdict = "are refused" if name == "harmful" else "are answered"
    raise InputError(
        f"only {kept} of {given} {name} prompts {verdict} by the model: raise --{option}, give "
        f"another --{name} source, name the refusal tokens with --refusal-token, or keep all with "
        "--no-filter"
    )
