"""Random models whose next tokens are no close call, so that rounding chooses none."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def far_from_ties(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of ``config``, the same each time."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model
