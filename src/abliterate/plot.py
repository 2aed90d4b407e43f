"""Figures of results, as plotly figures: a notebook shows them, ``.write_html`` keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from abliterate.api.directions import Selection
from abliterate.api.inputs import DirectionLike, as_vector
from abliterate.errors import InputError, UsageError
from abliterate.inference.interventions import unit_direction
from abliterate.report.selection_figures import METRICS, Table, heatmap
from abliterate.report.style import COLOURS, HARMFUL, HARMLESS, figure, plain, plotly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["projections", "selection"]

_NAMES = {metric.name.lower(): metric for metric in METRICS}
_KINDS = {"harmful": HARMFUL, "harmless": HARMLESS}


def selection(selection: Selection, metric: Literal["bypass", "induce", "kl"] = "bypass") -> Figure:
    """A score of every candidate over layer and position, with the filters and the winner.

    Args:
        selection: what ``ab.select`` returns.
        metric: ``bypass`` and ``induce`` (log-odds), or ``kl`` (nats).

    Returns:
        A plotly figure.

    Raises:
        UsageError: the metric is none of these, or plotly is missing.

    Source:
        Appendix C, figures of the selection.

    Examples:
        >>> ab.plot.selection(sel, "kl").layout.title.text
        'KL: KL divergence, harmless, ablated'
    """
    if metric not in _NAMES:
        raise UsageError(f"the metric must be {', '.join(_NAMES)}, not {metric!r}")
    tokens = dict(zip(selection.extraction.positions, selection.extraction.tokens, strict=True))
    return heatmap(Table(selection.to_dict(), tokens), _NAMES[metric])


def projections(activations: Any | Mapping[str, Any], direction: DirectionLike) -> Figure:
    """How far activations lie along a direction: ``h . r`` of every prompt, by group.

    Args:
        activations: ``[n, d_model]`` as tensor or array, or several of them by name (``harmful``
            and ``harmless`` have the colours of the report).
        direction: a direction or its vector ``[d_model]``; it is normalised.

    Returns:
        A plotly figure.

    Raises:
        InputError: the shapes do not fit.
        UsageError: plotly is missing.

    Source:
        Section 5, projections of activations onto the refusal direction.

    Examples:
        >>> acts = ab.activations(lm, harmful, layer=5)
        >>> [len(trace.y) for trace in ab.plot.projections({"harmful": acts}, d).data]
        [16]
    """
    groups = activations if isinstance(activations, Mapping) else {"activations": activations}
    made = figure("Along the direction", "", "h . r", 380)
    others = iter(COLOURS[2:] * (1 + len(groups) // 6))
    for name, values in groups.items():
        points = torch.as_tensor(values).detach().cpu().double()
        if points.ndim != 2 or not len(points):
            raise InputError(f"activations must be [n, d_model], not {list(points.shape)}")
        along = points @ unit_direction(as_vector(direction), points.shape[1])
        colour = _KINDS.get(str(name)) or next(others)
        made.add_trace(
            plotly().Violin(
                y=along.tolist(),
                name=f"{plain(name)} (n={len(points)})",
                line_color=colour,
                points="all",
                box_visible=True,
                meanline_visible=True,
                spanmode="hard",
            )
        )
    made.update_layout(showlegend=False)
    return made
