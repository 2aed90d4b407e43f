"""What select computes of a candidate, as plainly as it can be written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.inference.interventions import ablate, add
from abliterate.metrics.refusal import kl_divergence, refusal_score
from abliterate.selection.candidate_filters import Score
from abliterate.selection.search_inputs import Key, SearchInputs


def score_candidate_reference(inputs: SearchInputs, key: Key) -> Score:
    """The three scores of one candidate, prompt by prompt in full passes (paper, section 2.3).

    The definition that every search has to agree with, but for rounding; no search calls it.

    Args:
        inputs: the model, the candidates and the prompts; KL is measured at the last prompt token.
        key: position and layer of the candidate.

    Returns:
        Mean refusal score on harmful prompts with the direction ablated, the same on harmless
        prompts with it added at its layer, and mean KL(unmodified || ablated) on harmless prompts;
        NaN for a candidate that vanishes or is not finite.
    """
    position, layer = key
    if key in inputs.useless():
        return Score(position, layer, math.nan, math.nan, math.nan)
    model, tokens = inputs.model, inputs.refusal_tokens
    vector = inputs.vectors([key])[0]
    unmodified = _last_logits(model, inputs.harmless)
    with ablate(model, vector):
        bypass = refusal_score(_last_logits(model, inputs.harmful), tokens).mean()
        kl = kl_divergence(unmodified, _last_logits(model, inputs.harmless)).mean()
    with add(model, vector, layer):
        induce = refusal_score(_last_logits(model, inputs.harmless), tokens).mean()
    return Score(position, layer, float(bypass), float(induce), float(kl))


def _last_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """``[prompts, vocabulary]``, one prompt at a time."""
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        rows = [model(torch.tensor([ids], device=device)).logits[0, -1] for ids in prompts]
    return torch.stack(rows)
