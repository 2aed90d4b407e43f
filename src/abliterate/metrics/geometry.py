"""The geometry of harmful and harmless activations at one layer (paper, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from abliterate.extras import import_extra

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Geometry:
    """Harmful and harmless activations of one layer and position.

    Attributes:
        pc_shares: share of the pooled variance of the first two principal components.
        cos_pc1: ``|cos|`` between the first one and the difference of means.
        auc: how well the difference of means ranks harmful above harmless prompts; 1 is perfect.
        silhouette: mean silhouette of the two kinds in the projection onto it, -1 to 1.
        auc_selected: the AUC along the selected direction instead.
        silhouette_selected: the silhouette along it.
        harmful: ``[n, 2]``, projections onto the principal components, harmful side positive.
        harmless: the same.
    """

    pc_shares: tuple[float, float]
    cos_pc1: float
    auc: float
    silhouette: float
    auc_selected: float
    silhouette_selected: float
    harmful: Array
    harmless: Array


def sklearn(module: str) -> Any:
    """A module of scikit-learn.

    Raises:
        UsageError: it is not installed.
    """
    return import_extra(f"sklearn.{module}", "inspect", "scikit-learn", "report")


def measure(harmful: Tensor, harmless: Tensor, selected: Tensor) -> Geometry | None:
    """PCA and separation of two sets of activations.

    None where there is nothing to take apart: fewer than two prompts of a kind, or the same vector
    for every prompt (the embedding of a template token, which is ``resid_pre`` of layer 0).

    The AUC and silhouette are of the prompts that the means were taken over, so they say how well
    the kinds are apart there, not how a probe would do on others.

    Args:
        harmful: ``[n_harmful, d_model]``.
        harmless: ``[n_harmless, d_model]``.
        selected: the selected direction ``[d_model]``.
    """
    decomposition, metrics = sklearn("decomposition"), sklearn("metrics")
    points = np.concatenate([harmful.double().numpy(), harmless.double().numpy()])
    spread = np.ptp(points, axis=0).max()
    if min(len(harmful), len(harmless)) < 2 or spread <= 1e-6 * np.abs(points).max():
        return None
    is_harmful = np.arange(len(points)) < len(harmful)
    difference = points[is_harmful].mean(0) - points[~is_harmful].mean(0)
    pca = decomposition.PCA(n_components=2, svd_solver="full").fit(points)
    along = pca.components_ @ difference
    # A component's sign is arbitrary: harmful prompts go to the positive side.
    signs = np.where(along < 0, -1.0, 1.0)
    projected = pca.transform(points) * signs

    def separation(direction: Array) -> tuple[float, float]:
        values = points @ direction
        return (
            float(metrics.roc_auc_score(is_harmful, values)),
            float(metrics.silhouette_score(values[:, None], is_harmful)),
        )

    own = separation(difference)
    other = separation(selected.double().numpy())
    first, second = (float(share) for share in pca.explained_variance_ratio_)
    return Geometry(
        (first, second),
        float(abs(along[0]) / max(float(np.linalg.norm(difference)), 1e-300)),
        *own,
        *other,
        projected[is_harmful],
        projected[~is_harmful],
    )


def without_components(vectors: Tensor, *along: Tensor) -> Tensor:
    """``vectors`` less what they have in the span of ``along``; zero where nothing else is there.

    Args:
        vectors: float64 ``[..., d_model]``.
        along: each of a shape that broadcasts to theirs; what is zero, or in the span of those
            before it, changes nothing.

    Returns:
        Vectors whose cosine with each of ``along`` is rounding, or that are zero.
    """
    units: list[Tensor] = []
    for one in along:
        own = without_components(one, *units)
        units.append(own / own.norm(dim=-1, keepdim=True).clamp_min(1e-300))
    left = vectors
    for _ in range(2):  # what the first pass leaves is rounding of the whole vector
        for unit in units:
            left = left - (left * unit).sum(-1, keepdim=True) * unit
    emptied = left.norm(dim=-1, keepdim=True) <= 1e-9 * vectors.norm(dim=-1, keepdim=True)
    return left.masked_fill(emptied, 0.0)
