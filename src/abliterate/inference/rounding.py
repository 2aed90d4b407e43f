"""Whether two ways to the same logits differ by no more than rounding.

In float32 and float64 the largest difference tells: rounding is far below what any mistake does. In
half precision a deep model's rounding reaches 0.1 of the logits' spread somewhere among a hundred
thousand of them (seen on a 32-layer model in bfloat16 on a GPU, whose kernels add up in another
order for every batch size), which is more than some mistakes do. Its root mean square stays below
0.03; padding that attention sees, or a token that is missing, moves it by 0.07 and more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.models.quantized_loading import is_quantized
from abliterate.precision import widest

# Of the root mean square in half precision, relative to the spread.
COARSE = 5e-2


def computes_finely(model: PreTrainedModel) -> bool:
    """Whether the largest difference tells."""
    return model.dtype in (torch.float32, torch.float64) and not is_quantized(model)


def off_by(found: Tensor, expected: Tensor, fine: bool, spread: float | None = None) -> float:
    """How far ``found`` is from ``expected``, relative to the spread of the expected logits.

    Args:
        found: logits.
        expected: logits of the same shape.
        fine: take the largest difference, else the root mean square.
        spread: standard deviation to compare with; None for that of ``expected``.

    Returns:
        A number; infinity where a difference is no number.
    """
    ours, theirs = (logits.to(widest(logits.device)) for logits in (found, expected))
    difference = ours - theirs
    size = difference.abs().max() if fine else difference.square().mean().sqrt()
    told = [size] if spread is not None else [size, theirs.std()]
    farthest, *own = torch.stack(told).tolist()  # an accelerator is waited for once
    off = farthest / ((own[0] if spread is None else spread) + 1e-30)
    return off if math.isfinite(off) else math.inf


def same_logits(model: PreTrainedModel, found: Tensor, expected: Tensor) -> bool:
    """Whether logits of two ways through ``model`` differ by no more than rounding."""
    fine = computes_finely(model)
    return off_by(found, expected, fine) <= (1e-3 if fine else COARSE)
