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
# Copies of a prompt that show how a batch of another size rounds; what they may differ by among
# themselves, and another way beyond them. A mistake comes on top: 0.07 on 0.05 is 1.7 times that.
COPIES = 4
_COPIES_APART, _BEYOND_COPIES = 1e-2, 1.3
LARGEST_ROUNDING = 0.1


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


def rounding_of_batches(copies: Tensor, alone: Tensor, spread: float | None = None) -> float:
    """How far logits in half precision may be off where a batch has another size.

    Deep models can round by more than ``COARSE`` there (0.052 seen on a 32-layer model on a GPU
    under an intervention). A batch of copies of one prompt tells: nothing is padded in it.

    Args:
        copies: logits ``[copies, rows, vocabulary]`` of batches, each row's of one prompt.
        alone: logits ``[rows, vocabulary]`` of these prompts, each in a pass of its own.
        spread: as for :func:`off_by`.

    Returns:
        A relative root mean square; 0 where the copies differ, as then rows influence each other.
    """
    apart = max(off_by(one, copies[0], False, spread) for one in copies[1:])
    if apart > _COPIES_APART:
        return 0.0
    pairs = zip(copies[0], alone, strict=True)
    farthest = max(off_by(found, expected, False, spread) for found, expected in pairs)
    return min(_BEYOND_COPIES * farthest, LARGEST_ROUNDING)


def same_logits(model: PreTrainedModel, found: Tensor, expected: Tensor) -> bool:
    """Whether logits of two ways through ``model`` differ by no more than rounding."""
    fine = computes_finely(model)
    return off_by(found, expected, fine) <= (1e-3 if fine else COARSE)
