"""How far the logits of an edited checkpoint are from those of ablation's hooks on its source.

Behind a norm that stands between a writer and the stream they differ: the edit changes what enters
the norm, so its scale, and the hooks act behind it (docs/writers.md). Elsewhere it is rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.errors import InputError
from abliterate.inference.engine import Change
from abliterate.inference.in_memory import engine_of
from abliterate.metrics.refusal import kl_divergence
from abliterate.models.loading import LoadedModel


@dataclass(frozen=True)
class HookDistance:
    """At the last token of prompts.

    Attributes:
        logits: largest difference between a logit of the edit and of the hooks.
        moved: largest difference between a logit of the hooks and of the unmodified model.
        kl: mean KL(hooks || edit), in nats.
    """

    logits: float
    moved: float
    kl: float


def hooks_of(
    source: LoadedModel, direction: Direction | DirectionSet, prompts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Last-token logits ``[prompts, vocabulary]`` of a model as it is, and under ablation.

    Raises:
        InputError: the direction does not fit.
    """
    change: Change = (
        (direction.vector, None) if isinstance(direction, Direction) else (direction, None)
    )
    found = engine_of(source).last_logits(
        {"": prompts}, {"plain": None, "ablate": change}, description="verify: hooks"
    )
    return found["plain"][""], found["ablate"][""]


def hook_distance(
    hooks: tuple[Tensor, Tensor], edited: LoadedModel, prompts: Sequence[Sequence[int]]
) -> HookDistance:
    """How far an edited model is from the hooks on its source.

    Args:
        hooks: what :func:`hooks_of` gave for the same prompts.
        edited: the edited model.
        prompts: token ids.

    Raises:
        InputError: it has another vocabulary.
    """
    plain, ablated = (logits.double() for logits in hooks)
    found = engine_of(edited).last_logits({"": prompts}, {"": None}, description="verify: edit")
    mine = found[""][""].double()
    if mine.shape != ablated.shape:
        raise InputError(
            f"{edited.checkpoint.name} has a vocabulary of {mine.shape[1]}, its source "
            f"{ablated.shape[1]}: give the source that it was made from"
        )
    return HookDistance(
        float((mine - ablated).abs().max()),
        float((ablated - plain).abs().max()),
        float(kl_divergence(ablated, mine).mean()),
    )
