"""extract: mean ``resid_pre`` over harmful and over harmless prompts (paper, section 2.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from abliterate.console import log
from abliterate.distributed.rank_group import RankGroup
from abliterate.errors import InputError
from abliterate.extraction.extraction import Extraction
from abliterate.extraction.group_sums import GroupSums, assign_groups, stability
from abliterate.extraction.mean_activations import Kept, sums_of_groups
from abliterate.extraction.refusal_token_search import DETECT_PROMPTS, named_refusal_tokens, summed
from abliterate.extraction.robust_means import CollectedRows, Robust, clipped, require_one_process
from abliterate.inference.engine import ActivationReader, BatchActivations
from abliterate.inference.in_memory import engine_of
from abliterate.inference.thinks_first import or_thinks_first
from abliterate.inference.thoughts import Asked, ask, unfinished
from abliterate.metrics.refusal_evidence import find_first_refusal_tokens
from abliterate.models.loading import LoadedModel
from abliterate.precision import to_host, widest
from abliterate.prompts.chat_template import ChatFormat, parse_positions, position_tokens
from abliterate.prompts.sources import Prompt, check_prompts

# Fewer prompts than this make a mean that is mostly noise.
_MIN_PROMPTS = 8

# What the reader calls the beginnings of prompts.
_FIRST = "first token"

# Called with a kind of prompt, its rows, and their ``[batch, n_positions, n_layers, d_model]``.
Keep = Callable[[str, Sequence[int], Tensor], None]


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
    seed: int = 0,
    robust: Robust = "none",
    winsor_quantile: float = 0.05,
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
        seed: of the halves of the prompts whose candidates are compared.
        robust: ``none`` is the paper's mean; ``winsor`` and ``median`` are means that outliers do
            not move, for which all activations of a kind are held at once.
        winsor_quantile: the share of the prompts whose values are pulled in at each end.

    Raises:
        InputError: there are too few prompts, or too few are left, or one is shorter than a
            position.
        UsageError: a position or refusal token does not exist, or several ranks are to find a
            robust mean.
    """
    require_one_process(robust, loaded.ranks)
    check_prompts(harmful=harmful, harmless=harmless)
    chat = chat or ChatFormat()
    tokenizer = loaded.tokenizer
    asked = {
        kind: ask(loaded, [prompt.text for prompt in prompts], chat, batch_size, kind)
        for kind, prompts in (("harmful", harmful), ("harmless", harmless))
    }
    ids = {kind: one.ids for kind, one in asked.items()}
    position_list, position_texts = _positions(positions, tokenizer, chat, asked)
    _check_positions(position_list, ids)
    ranks, harmful_ids = loaded.ranks, asked["harmful"].finished("harmful")
    local_ids = {kind: ranks.split(rows) for kind, rows in ids.items()}
    openings = _openings(ids["harmless"], -position_list[0])
    local_ids |= {_FIRST: list(openings.values())}
    reader = engine_of(loaded).resid_pre(local_ids, position_list, batch_size)
    # What the refusal tokens are detected from is not run again for the means.
    seen: dict[str, list[BatchActivations]] = {kind: [] for kind in ids}
    if refusal_tokens:
        tokens = named_refusal_tokens(loaded, refusal_tokens)
    else:
        counts = {kind: len(rows) for kind, rows in ids.items()}
        first_tokens = _first_token_shares(reader, counts, seen, ranks)
        with or_thinks_first(loaded, chat, harmful_ids):
            tokens = find_first_refusal_tokens(*first_tokens, tokenizer, ids)

    def sums(kind: str, sign: float) -> tuple[GroupSums, Kept]:
        groups = assign_groups(len(ids[kind]), reader.shape, seed, kind)
        collected = CollectedRows(len(groups), reader.shape)
        takers: list[Callable[[Sequence[int], Tensor], None]] = []
        if keep:
            takers.append(partial(keep, kind))
        if robust != "none":
            takers.append(collected.put)
        result, kept = sums_of_groups(
            reader,
            kind,
            ranks.split(groups),
            seen=seen[kind],
            refusal_tokens=tokens if filter else None,
            sign=sign,
            keep=takers,
            ended=ranks.split(asked[kind].ended),
            ranks=ranks,
        )
        if filter:
            with or_thinks_first(loaded, chat, harmful_ids):
                require_min_prompts(kind, sum(kept), len(kept), "n-train")
        if robust != "none":
            if robust == "winsor" and not clipped(sum(kept), winsor_quantile):
                log.warning(
                    "--winsor-quantile %g of %d %s prompts is none: their plain mean is taken",
                    winsor_quantile,
                    sum(kept),
                    kind,
                )
            result = collected.sums(kept, groups, robust, winsor_quantile)
        return result, kept

    sums_harmful, kept_harmful = sums("harmful", 1.0)
    sums_harmless, kept_harmless = sums("harmless", -1.0)
    used = Counter(row[0] for row, kept in zip(ids["harmless"], kept_harmless, strict=True) if kept)
    with ranks.fail_together():
        mean_first_token = _first_token_mean(reader, list(openings), used)
    return Extraction(
        sums_harmful.mean,
        sums_harmless.mean,
        position_list,
        position_texts,
        tuple(tokens),
        kept_harmful,
        kept_harmless,
        unfinished(asked),
        stability(sums_harmful, sums_harmless),
        mean_first_token=mean_first_token,
    )


def _openings(prompts: Sequence[Sequence[int]], length: int) -> dict[int, list[int]]:
    """The different first tokens of prompts, each with the ``length`` tokens that one begins with.

    What a causal model computes at its first token depends on that token alone, so these stand for
    all prompts; a chat template has most often one.
    """
    return {row[0]: list(row[:length]) for row in reversed(prompts)}


def _first_token_mean(
    reader: ActivationReader, tokens: Sequence[int], used: Mapping[int, int]
) -> Tensor:
    """Mean ``resid_pre`` of the first token over prompts, float64 ``[n_layers, d_model]``.

    Args:
        reader: gives, as kind ``_FIRST``, prompts that begin at its first position.
        tokens: what each of them begins with.
        used: how many prompts begin with each.
    """
    found: dict[int, Tensor] = {}

    def take(batch: BatchActivations) -> None:
        (streams,) = to_host(batch.activations[:, 0])
        found.update((tokens[row], streams[index]) for index, row in enumerate(batch.rows))

    reader.read(_FIRST, range(len(tokens)), take, "extract: first token")
    streams = sum(used[token] * stream.double() for token, stream in found.items())
    return torch.as_tensor(streams) / sum(used.values())


def _positions(
    spec: str, tokenizer: Any, chat: ChatFormat, asked: Mapping[str, Asked]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The positions that ``--positions`` names, and the token at each.

    Behind a thought, ``post-instruction`` stands for the tokens that end it.
    """
    closing = min(one.closing for one in asked.values())
    if not closing:
        positions = parse_positions(spec, tokenizer, chat)
        return positions, tuple(position_tokens(tokenizer, positions, chat))
    behind = spec == "post-instruction"
    positions = tuple(range(-closing, 0)) if behind else parse_positions(spec, tokenizer, chat)
    last = asked["harmful"].finished("harmful")[0]
    texts = (
        tokenizer.decode([last[position]]) if -position <= closing else "(thought)"
        for position in positions
    )
    return positions, tuple(texts)


def _check_positions(positions: Sequence[int], ids: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Refuse positions (ascending) that a prompt does not have."""
    shortest = min(len(row) for rows in ids.values() for row in rows)
    if shortest < -positions[0]:
        raise InputError(
            f"position {positions[0]} lies before the start of a prompt of {shortest} tokens: pass "
            "later --positions"
        )


def _first_token_shares(
    reader: ActivationReader,
    counts: Mapping[str, int],
    seen: Mapping[str, list[BatchActivations]],
    ranks: RankGroup,
) -> tuple[Tensor, Tensor]:
    """Mean first-token probabilities ``[vocabulary]`` after the first harmful, harmless prompts.

    Args:
        reader: gives this rank's prompts.
        counts: how many prompts of each kind all ranks have.
        seen: gets what the prompts that were run have shown.
        ranks: the processes that share the prompts.
    """
    first = len(ranks.split(range(DETECT_PROMPTS)))
    local_sums: dict[str, list[Tensor]] = {kind: [] for kind in seen}
    with ranks.fail_together():
        for kind, batches in seen.items():
            local_count = len(ranks.split(range(counts[kind])))
            note = partial(_note, batches, local_sums[kind])
            reader.read(kind, range(min(first, local_count)), note, f"extract: {kind}")
    parts = [part for local in local_sums.values() for part in local]
    fetched = iter(to_host(*parts) if parts else [])  # in one transfer
    sums = {kind: summed([next(fetched) for _ in local]) for kind, local in local_sums.items()}
    harmful, harmless = (
        summed(ranks.all_gather(sums[kind])) / min(DETECT_PROMPTS, counts[kind])
        for kind in ("harmful", "harmless")
    )
    return harmful, harmless


def _note(seen: list[BatchActivations], sums: list[Tensor], batch: BatchActivations) -> None:
    """Keep a batch, and its summed next-token probabilities ``[vocabulary]`` where they lie."""
    own = batch.logits
    sums.append(own.to(widest(own.device)).softmax(-1).sum(0))
    seen.append(batch)  # last: a batch that runs out of memory comes again in parts


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
        f"only {kept} of {given} {name} prompts {verdict} by the model: give more (--{option}) or "
        f"another --{name} source, name the refusal tokens with --refusal-token, or keep all with "
        "--no-filter"
    )
