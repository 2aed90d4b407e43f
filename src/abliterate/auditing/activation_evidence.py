"""What a model does, beside what its files show: how far its first tokens tell harmful prompts from
harmless ones, and whether its writers still put out anything along a direction.

No verdict rests on this. A model may have been trained not to refuse, and a direction along which
writers say nothing may be one that nothing needs; the weights tell an edit from both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from abliterate.errors import CheckpointError, InputError, UnsupportedArchitectureError
from abliterate.inference.engine import Prompts
from abliterate.inference.forward import Batch, for_each_batch, last_logits
from abliterate.inference.in_memory import engine_of
from abliterate.inference.interventions import unit_direction
from abliterate.inference.thoughts import ask
from abliterate.metrics.refusal import refusal_score
from abliterate.metrics.refusal_evidence import find_first_refusal_tokens
from abliterate.metrics.refusal_tokens import resolve_refusal_tokens, token_text
from abliterate.models.embedding_rows import require_token
from abliterate.models.loading import Checkpoint, LoadedModel
from abliterate.offload import OpenOptions, in_memory_opener
from abliterate.prompts.chat_template import ChatFormat
from abliterate.writers import find_writers, stream_width

KINDS = ("harmful", "harmless")
# Random directions whose shares show what this model's writers put out along any direction.
_RANDOM = 256


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model put out at the last token of prompts of two kinds.

    Attributes:
        logits: last-token logits by kind, ``[prompts, vocabulary]``.
        differences: mean over harmful less mean over harmless prompts of what each component
            writes to the stream, float64 ``[terms, d_model]``.
        layers: the decoder block of each term, None outside the blocks.
        notes: what could not be seen.
    """

    logits: Mapping[str, Tensor] = field(repr=False)
    differences: Tensor = field(repr=False)
    layers: tuple[int | None, ...]
    notes: tuple[str, ...] = ()


def look_at_outputs(
    loaded: LoadedModel, prompts: Mapping[str, Prompts], name: str = "model"
) -> Seen:
    """Run prompts of two kinds and keep what the model's components write at their last tokens.

    Args:
        loaded: the model, in memory.
        prompts: token ids, by kind.
        name: shown beside the progress bar.

    Raises:
        UnsupportedArchitectureError: the model's writers are not known.
        UsageError: a single prompt does not fit into memory.
    """
    with engine_of(loaded).in_memory("audit --prompts") as model, torch.inference_mode():
        plan = find_writers(model)
        sites = [site for site in plan.sites if site.at == "output"]
        means: dict[str, dict[tuple[int, int], Tensor]] = {}
        logits: dict[str, Tensor] = {}
        for kind in KINDS:
            sums: dict[tuple[int, int], Tensor] = {}
            rows: dict[int, Tensor] = {}

            def run(
                batch: Batch,
                sums: dict[tuple[int, int], Tensor] = sums,
                rows: dict[int, Tensor] = rows,
            ) -> None:
                calls: dict[tuple[int, int], Tensor] = {}
                with ExitStack() as hooks:
                    for index, site in enumerate(sites):
                        handle = model.get_submodule(site.module).register_forward_hook(
                            _keeping(calls, index, site.index, batch)
                        )
                        hooks.callback(handle.remove)
                    last = last_logits(model, batch).cpu()
                # Only now: a batch that did not fit is run again in parts.
                for key, total in calls.items():
                    sums[key] = sums[key] + total if key in sums else total
                rows.update(zip(batch.rows, last, strict=True))

            for_each_batch(model, prompts[kind], run, description=f"audit: {name}, {kind}")
            means[kind] = {key: total / len(prompts[kind]) for key, total in sums.items()}
            logits[kind] = torch.stack([rows[row] for row in range(len(rows))])
    # An expert that only one kind of prompts reaches writes nothing for the other.
    keys = sorted(means["harmful"].keys() | means["harmless"].keys())
    terms, layers = list[Tensor](), list[int | None]()
    for key in keys:
        one, other = (means[kind].get(key) for kind in KINDS)
        some = one if one is not None else other
        assert some is not None
        none = torch.zeros_like(some)
        term = (none if one is None else one) - (none if other is None else other)
        streams = term.view(-1, stream_width(model, plan))
        terms.append(streams)
        layers += [sites[key[0]].layer] * len(streams)
    notes = []
    if len(sites) < len(plan.sites):
        notes.append("terms of the stream that are no module's output were not looked at")
    return Seen(logits, torch.cat(terms), tuple(layers), tuple(notes))


def _keeping(calls: dict[tuple[int, int], Tensor], index: int, place: int, batch: Batch) -> Any:
    """A hook that adds up what a module puts out at the last tokens of a batch.

    Positions that all rows share count once for each of them.
    """
    n, tokens = batch.input_ids.shape

    def hook(module: Any, given: Any, output: Any) -> None:
        value = output[place] if isinstance(output, tuple | list) else output
        if value.ndim == 2 and value.shape[0] in (n * tokens, tokens):
            value = value.view(-1, tokens, value.shape[-1])
        if value.ndim < 3 or value.shape[0] not in (n, 1) or value.shape[1] not in (tokens, 1):
            raise UnsupportedArchitectureError(
                f"audit --prompts cannot tell which prompt is which in an output of shape "
                f"{list(value.shape)}: leave --prompts out"
            )
        last = value[:, -1].detach().flatten(1).cpu().double()
        number = sum(key[0] == index for key in calls)
        calls[index, number] = last.sum(0) * (n / len(last))

    return hook


@dataclass(frozen=True, kw_only=True)
class Along:
    """How much of what tells the prompts apart writers put out along a direction.

    Attributes:
        share: ``sum_w (r . m_w)^2 / sum_w |m_w|^2`` over the components ``w`` that write to the
            stream, with ``m_w`` the mean difference of what each puts out; 0 to 1.
        by_layer: the same for each decoder block that writes a difference.
        random: least, median and largest share along random directions of this model.
    """

    share: float
    by_layer: Mapping[int, float]
    random: Mapping[str, float]


def energy_along(seen: Seen, direction: Tensor) -> Along | None:
    """The share of the mean difference's energy that components put out along a direction.

    Args:
        seen: of the model.
        direction: ``[d_model]``, of any length but zero.

    Returns:
        None where no component writes a difference.

    Raises:
        InputError: the direction does not fit.
    """
    terms = seen.differences
    unit = unit_direction(direction, terms.shape[1])
    energy = terms.square().sum(1)
    total = float(energy.sum())
    if not total > 0:
        return None
    along = (terms @ unit).square()
    by_layer = {}
    for layer in sorted({layer for layer in seen.layers if layer is not None}):
        rows = [row for row, own in enumerate(seen.layers) if own == layer]
        if float(energy[rows].sum()) > 0:
            by_layer[layer] = float(along[rows].sum() / energy[rows].sum())
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(_RANDOM, terms.shape[1], generator=generator, dtype=torch.float64)
    others /= others.norm(dim=1, keepdim=True)
    shares = (terms @ others.T).square().sum(0) / total
    return Along(
        share=float(along.sum()) / total,
        by_layer=by_layer,
        random={
            "n": _RANDOM,
            "least": float(shares.min()),
            "median": float(shares.median()),
            "largest": float(shares.max()),
        },
    )


def refusal_gap(seen: Seen, tokens: Sequence[int]) -> dict[str, float]:
    """Mean refusal score (log-odds, nats) of each kind of prompts, and harmful less harmless."""
    means = {kind: float(refusal_score(seen.logits[kind], tokens).mean()) for kind in KINDS}
    return means | {"gap": means["harmful"] - means["harmless"]}


@dataclass(frozen=True, eq=False, kw_only=True)
class Gathered:
    """What the checkpoint and its base put out, before anything is known of a direction.

    Attributes:
        checkpoint: what was seen of it.
        base: what was seen of the base, or None.
        tokens: ids of the refusal tokens; empty where there are none.
        texts: the tokens as people read them.
        tokens_from: ``named``, ``base``, ``checkpoint`` or None.
        notes: what could not be seen, and why.
    """

    checkpoint: Seen
    base: Seen | None
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    tokens_from: str | None
    notes: tuple[str, ...]

    def document(self, given: Tensor | None, found: Tensor | None) -> dict[str, Any]:
        """All of it for JSON, along a direction ``[d_model]`` if there is one.

        Args:
            given: the direction that the user names, which counts.
            found: else the one that the weights show.

        Raises:
            InputError: the direction does not fit.
        """
        direction = found if given is None else given
        notes = list(self.notes)
        if direction is None:
            notes.append(
                "the weights show no direction to measure the writers along: --direction names one"
            )
        held = None if direction is None else "weights"
        return {
            "direction_from": held if given is None else "given",
            "checkpoint": self._measured(self.checkpoint, direction),
            "base": None if self.base is None else self._measured(self.base, direction),
            "refusal_tokens": list(self.texts),
            "refusal_tokens_from": self.tokens_from,
            "notes": notes,
        }

    def _measured(self, seen: Seen, direction: Tensor | None) -> dict[str, Any]:
        along = None if direction is None else energy_along(seen, direction)
        return {
            "refusal_scores": refusal_gap(seen, self.tokens) if self.tokens else None,
            "energy": None
            if along is None
            else {
                "share": along.share,
                "by_layer": {str(layer): share for layer, share in along.by_layer.items()},
                "random_directions": dict(along.random),
            },
        }


def gather(
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    texts: Mapping[str, Sequence[str]],
    names: Sequence[str] = (),
    device: str = "cpu",
    chat: ChatFormat | None = None,
) -> Gathered:
    """Run the checkpoint, and its base in the same way, one after the other in memory.

    The refusal tokens are those that are named, else those that the base shows, which refuses,
    else those of the checkpoint itself; an edited one shows none.

    Args:
        checkpoint: what is judged.
        base: what it is said to be made from, or None.
        texts: prompts, by kind.
        names: refusal tokens, as ``--refusal-token`` gives them; empty to detect.
        device: where to run them.
        chat: how prompts become conversations; None for the templates as they are.

    Raises:
        CheckpointError: a model cannot be loaded, or has no logit for a named token.
        InputError: there is no chat template, or no thought about the prompts ends.
        UnsupportedArchitectureError: the model's writers are not known.
        UsageError: a model does not fit into memory, or a name is not a single token.
    """
    chat = chat or ChatFormat()
    tokens, written, source, notes = list[int](), tuple[str, ...](), None, list[str]()
    seen: dict[str, Seen] = {}
    for label, model in (("base", base), ("checkpoint", checkpoint)):
        if model is None:
            continue
        loaded = in_memory_opener(model, OpenOptions(device)).open(model)
        prompts = {kind: ask(loaded, texts[kind], chat, kind=kind).finished(kind) for kind in KINDS}
        seen[label] = look_at_outputs(loaded, prompts, label)
        if not tokens:
            try:
                tokens = _refusal_tokens(loaded, seen[label], prompts, names)
            except InputError as error:
                notes.append(f"{label}: {error}")
            else:
                source = "named" if names else label
                written = tuple(token_text(loaded.tokenizer, token) for token in tokens)
        notes += seen[label].notes
    if tokens and max(tokens) >= seen["checkpoint"].logits["harmful"].shape[1]:
        raise CheckpointError(
            f"{checkpoint.folder} has no logit for the refusal tokens of its base: name its own "
            "with --refusal-token"
        )
    return Gathered(
        checkpoint=seen["checkpoint"],
        base=seen.get("base"),
        tokens=tuple(tokens),
        texts=written,
        tokens_from=source,
        notes=tuple(dict.fromkeys(notes)),
    )


def _refusal_tokens(
    loaded: LoadedModel, seen: Seen, prompts: Mapping[str, Prompts], names: Sequence[str]
) -> list[int]:
    """The refusal tokens named, or those that the first tokens of this model show."""
    if names:
        tokens = resolve_refusal_tokens(loaded.tokenizer, names)
        for token in tokens:
            require_token(loaded.model, token, "--refusal-token")
        return tokens
    shares = {kind: seen.logits[kind].double().softmax(-1).mean(0) for kind in KINDS}
    return find_first_refusal_tokens(
        shares["harmful"], shares["harmless"], loaded.tokenizer, prompts
    )
