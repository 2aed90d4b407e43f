"""Prove a plan: carry it out on a small random copy and measure what is left of the direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from abliterate.writers.discovery import discover, project
from abliterate.writers.parameter_names import module_name
from abliterate.writers.plan import WriterPlan
from abliterate.writers.residual_stream import leak
from abliterate.writers.tiny_model import shrunken

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: A leak that is rounding in float32.
EXACT = 1e-5


@dataclass(frozen=True)
class Proof:
    """What is left of a random direction after a plan, in a random copy of an architecture.

    Attributes:
        leak: the largest ``|h . r| / ||h||`` over block boundaries and tokens after the edit.
        before: the same before it.
        plan: with the parameter names of the full model.
        exact: ``leak`` is rounding and nothing stands in the way.
        reason: why not, else empty.
        decoder: name of the decoder in the copy, which the plan's names start with.
    """

    leak: float
    before: float
    plan: WriterPlan
    exact: bool
    reason: str
    decoder: str


def prove(model_or_config: PreTrainedModel | PretrainedConfig, seed: int = 0) -> Proof:
    """Discover, edit and measure on a small random copy of the architecture.

    The copy keeps depth, layer pattern and experts; the tokens that measure are not those that
    were traced. The model itself, if one is given, is not touched: only its config is read.

    Raises:
        ShrinkError: where no copy can be built.
        DiscoveryError: where it has no decoder blocks.
    """
    config = getattr(model_or_config, "config", model_or_config)
    return prove_in_place(shrunken(config, seed), seed)


def prove_in_place(model: PreTrainedModel, seed: int = 0) -> Proof:
    """As :func:`prove`, on the model itself, which is edited by it: for a copy, or to throw away.

    Raises:
        DiscoveryError: where it has no decoder blocks.
    """
    plan = discover(model)
    decoder = module_name(model, model.get_decoder())
    generator = torch.Generator().manual_seed(seed + 1)
    direction = torch.randn(plan.d_model, generator=generator)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, min(130, vocabulary), (2, 17), generator=generator)
    before = leak(model, direction, ids, plan.blocks)
    project(model, plan, direction)
    after = leak(model, direction, ids, plan.blocks)
    reasons = [f"{o.module}: {o.reason}" for o in plan.obstacles]
    if not reasons and not after <= EXACT:
        reasons = [f"leak of {after:.1e} although nothing was found to stand in the way"]
    return Proof(after, before, plan, not reasons, "; ".join(reasons), decoder)
