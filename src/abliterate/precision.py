"""Wide arithmetic on devices that have float64 and on those that do not.

Scores, means and losses are made in float64. A CPU and CUDA have it, and there it is used where the
numbers lie. Apple's MPS (and some XPUs) refuse it, so there:

- what is wide (logits ``[batch, vocabulary]``, activations) is reduced on the device, in float32
  where its rounding does no harm (a softmax and what is read from it: within 1e-5), by compensated
  sums where it would (:func:`summed_rows`): moving it to the host to widen it would cost more than
  the pass that made it;
- what is left, some numbers a row, is moved to the host and is float64 from there on
  (:func:`widened`).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


@cache
def _computes_float64(kind: str) -> bool:
    try:
        # Computed, not only made: some devices find out when they run.
        return bool(torch.ones(2, dtype=torch.float64, device=kind).sum() == 2)
    except (RuntimeError, TypeError):
        return False


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; tried once."""
    return device.type in ("cpu", "cuda", "meta") or _computes_float64(device.type)


def widest(device: torch.device) -> torch.dtype:
    """The widest float dtype of a device: float64, or float32 where it has none."""
    return torch.float64 if has_float64(device) else torch.float32


def widened(values: Tensor) -> Tensor:
    """``values`` in float64: where they lie, or on the host where their device has none.

    For what is small: a few numbers, or one row.
    """
    return values.double() if has_float64(values.device) else values.cpu().double()


def linear_algebra_device(device: torch.device) -> torch.device:
    """``device``, or the host where it has no float64: factorisations cannot do without."""
    return device if has_float64(device) else torch.device("cpu")


def summed_rows(rows: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    """The sum of some of ``rows`` over their first axis, in float64's precision.

    An accelerator is not waited for: the rows are masked, not chosen. Without float64 the sum is a
    tree of two-sums (Knuth), whose errors are summed beside it: the result is as exact as float64's
    but for the last digits.

    Args:
        rows: ``[n, ...]``, at least one.
        which: which of them count, bool ``[n]`` (or of more leading axes) on the same device.

    Returns:
        Tensors ``[...]`` on the device, in its widest dtype, which add up to the sum in float64:
        :func:`to_host` fetches them.
    """
    if rows.device.type == "cpu":
        return (rows[which].sum(0, dtype=torch.float64),)
    # Not a product: what does not count may be NaN.
    mask = which.view(*which.shape, *[1] * (rows.ndim - which.ndim))
    chosen = torch.where(mask, rows, rows.new_zeros(()))
    if has_float64(rows.device):
        return (chosen.sum(0, dtype=torch.float64),)
    return _two_sums(chosen.float())


def _two_sums(high: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the first axis, float32 ``[...]``, and what its rounding has lost."""
    low = torch.zeros_like(high)
    while (n := len(high)) > 1:
        half = n // 2
        a, b = high[:half], high[half : 2 * half]
        total = a + b
        of_b = total - a
        lost = (a - (total - of_b)) + (b - of_b) + low[:half] + low[half : 2 * half]
        if n % 2:
            total, lost = torch.cat([total, high[-1:]]), torch.cat([lost, low[-1:]])
        high, low = total, lost
    return high[0], low[0]


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Several small tensors of one device as float64 on the host, in one transfer."""
    if tensors[0].device.type == "cpu":
        return [tensor.double() for tensor in tensors]
    wide = widest(tensors[0].device)
    flat = torch.cat([tensor.reshape(-1).to(wide) for tensor in tensors]).cpu().double()
    parts = torch.split(flat, [math.prod(tensor.shape) for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
