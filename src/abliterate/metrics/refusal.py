"""The refusal score and the KL divergence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abliterate.errors import UsageError
from abliterate.precision import widened, widest

_SCORE_EPSILON = 1e-8
_KL_EPSILON = 1e-6
# The largest refusal score, at p = 1, rounded up.
MAX_REFUSAL_SCORE = 18.421


def refusal_score(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Log-odds that the first token starts a refusal (paper, section 2.3 and appendix B).

    Args:
        logits: ``[batch, vocabulary]`` at the last prompt token.
        token_ids: the refusal tokens.

    Returns:
        float64 ``[batch]``: ``log(p + 1e-8) - log(1 - p + 1e-8)``, p the mass on ``token_ids``; on
        the host where the logits' device has no float64.
    """
    return widened(log_odds(logits, token_ids))


def log_odds(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """:func:`refusal_score` in the widest dtype of the logits' device, where they lie.

    In float32 ``1 - p`` would cancel: there it is the mass on all other tokens.
    """
    probabilities = logits.to(widest(logits.device)).softmax(dim=-1)
    # Column by column: a list of them would first travel to the device.
    p = torch.stack([probabilities[:, token] for token in token_ids], dim=-1).sum(dim=-1)
    if probabilities.dtype == torch.float64:
        others = 1 - p
    else:
        for token in token_ids:
            probabilities[:, token] = 0
        others = probabilities.sum(dim=-1)
    return torch.log(p + _SCORE_EPSILON) - torch.log(others + _SCORE_EPSILON)


def check_refusal_tokens(token_ids: Sequence[int], vocabulary: int) -> None:
    """Refuse what :func:`refusal_score` cannot look up.

    Raises:
        UsageError: there is no token, or one is no id below ``vocabulary``.
    """
    if not token_ids:
        raise UsageError("there are no refusal tokens: give at least one token id")
    for token in token_ids:
        if not isinstance(token, int) or not 0 <= token < vocabulary:
            raise UsageError(
                f"refusal token {token!r} is no token id: the model has 0 to {vocabulary - 1}"
            )


def kl_divergence(baseline: Tensor, ablated: Tensor) -> Tensor:
    """KL(baseline || ablated) of next-token distributions, in nats (paper, appendix C).

    Args:
        baseline: logits ``[..., vocabulary]``.
        ablated: logits ``[..., vocabulary]``; leading axes broadcast.

    Returns:
        float64 ``[...]``, with the paper's epsilon of 1e-6 inside the logarithms; on the host where
        the logits' device has no float64.
    """
    return widened(local_kl(baseline, ablated))


def exact_kl(baseline: Tensor, ablated: Tensor) -> Tensor:
    """KL(baseline || ablated) as it is defined, without an epsilon, in nats.

    :func:`kl_divergence`, which is the paper's and which thresholds mean, is less where the ablated
    model all but excludes tokens that the baseline may say.

    Args:
        baseline: logits ``[..., vocabulary]``.
        ablated: logits ``[..., vocabulary]``; leading axes broadcast.

    Returns:
        float64 ``[...]``; on the host where the logits' device has no float64.
    """
    wide = widest(ablated.device)
    p, q = (logits.to(wide).log_softmax(dim=-1) for logits in (baseline, ablated))
    # A token that the baseline excludes counts nothing, whatever its logarithm.
    terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
    return widened(terms.sum(dim=-1))


def local_kl(baseline: Tensor, ablated: Tensor) -> Tensor:
    """:func:`kl_divergence` in the widest dtype of the logits' device, where they lie."""
    wide = widest(ablated.device)
    p = baseline.to(wide).softmax(dim=-1)
    q = ablated.to(wide).softmax(dim=-1)
    return (p * (torch.log(p + _KL_EPSILON) - torch.log(q + _KL_EPSILON))).sum(dim=-1)


def kl_floor(baseline: Tensor) -> Tensor:
    """The least that :func:`kl_divergence` can be, whatever the ablated logits are.

    The epsilon e lets it fall below zero. With w = p / (p + e), and for any c > 0,
    log x <= x / c - 1 + log c at x = (q + e) / (p + e), weighted by p and summed, gives
    -KL <= (sum of w (q + e)) / c - 1 + log c. As q sums to one, the first sum is at most
    s = max w + e * sum w; c = s yields KL >= -log s.

    Args:
        baseline: logits ``[..., vocabulary]``.

    Returns:
        ``[...]`` in the widest dtype of the logits' device, where they lie; at most zero and
        usually -1e-5 or so.
    """
    p = baseline.to(widest(baseline.device)).softmax(dim=-1)
    w = p / (p + _KL_EPSILON)
    if p.dtype == torch.float64:
        floor = -torch.log(w.amax(dim=-1) + _KL_EPSILON * w.sum(dim=-1))
    else:  # what the sum differs from one by, which float32 would round away: max w is 1 - e/(p+e)
        excess = w.sum(dim=-1) - 1 / (p.amax(dim=-1) + _KL_EPSILON)
        floor = -torch.log1p(_KL_EPSILON * excess)
    # It cannot exceed KL(p || p) = 0; rounding must not make it so.
    return floor.clamp(max=0.0)
