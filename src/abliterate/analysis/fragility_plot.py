"""The picture of fragility.json: refusal rate, refusal score and KL against the share removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from abliterate.errors import UsageError, one_line
from abliterate.extras import import_extra, missing_extra
from abliterate.storage.artifacts import write_atomically
from abliterate.storage.ownership import Kind, claim, is_page, is_picture, mark_picture
from abliterate.storage.web_page import figure_page

_PACKAGES = "plotly and kaleido"


def require_plotly() -> None:
    """Fail before any work is done if the picture cannot be drawn.

    Raises:
        UsageError: plotly is missing.
    """
    otherwise = ", or pass --no-picture"
    import_extra("plotly.graph_objects", "the picture", _PACKAGES, "report", otherwise)


def claim_pictures(folder: Path, images: Sequence[str]) -> None:
    """Refuse a folder in which :func:`draw` would replace something else.

    Raises:
        InputError: one of its names is taken by a link or by a foreign file.
    """
    pictures: dict[str, Kind] = {f"fragility.{kind}": is_picture for kind in images}
    claim(folder, {"fragility.html": is_page} | pictures)


def draw(record: Mapping[str, Any], folder: Path, images: Sequence[str] = ()) -> list[Path]:
    """Write ``fragility.html``, which needs no network, and images on request.

    Args:
        record: the document ``fragility.json``.
        folder: where to.
        images: ``png`` and ``svg``, drawn by kaleido in a Chrome.

    Raises:
        UsageError: plotly or kaleido is missing, or there is no Chrome.
    """
    require_plotly()
    from plotly.offline import get_plotlyjs

    figure = _figure(record)
    written = [folder / "fragility.html"]
    page = figure_page("Fragility of refusal", (), figure, get_plotlyjs())
    write_atomically(written[0], page.encode())
    for kind in images:
        try:
            content = figure.to_image(format=kind, scale=2)
        except Exception as error:  # kaleido raises many kinds; all mean that no image can be had
            short = one_line(error)[:160]
            needs = missing_extra(f"--image {kind}", _PACKAGES, "report")
            raise UsageError(f"{needs}, and a Chrome or Chromium ({short})") from None
        written.append(folder / f"fragility.{kind}")
        write_atomically(written[-1], mark_picture(content))
    return written


def _figure(record: Mapping[str, Any]) -> Any:
    """Above refusal rates and score, below KL, over the share removed."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    points = record["points"]
    fractions = [point["fraction"] for point in points]
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.6, 0.4],
        specs=[[{"secondary_y": True}], [{}]],
    )  # fmt: skip

    def line(key: str, name: str, dash: str = "solid") -> Any:
        values = [point[key] for point in points]
        spans = [point.get(f"{key}_ci") for point in points]
        bars = None
        if all(spans):
            above = [span[1] - value for value, span in zip(values, spans, strict=True)]
            below = [value - span[0] for value, span in zip(values, spans, strict=True)]
            bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        return go.Scatter(x=fractions, y=values, name=name, mode="lines+markers",
                          line={"dash": dash}, error_y=bars)  # fmt: skip

    counts = record["n_prompts"]
    rates = [f"refusal rate, {kind} (n={count})" for kind, count in counts.items()]
    figure.add_trace(line("refusal_rate", rates[0]), row=1, col=1)
    figure.add_trace(line("harmless_refusal_rate", rates[1], "dot"), row=1, col=1)
    figure.add_trace(
        line("bypass_score", "refusal score, harmful", "dash"), row=1, col=1, secondary_y=True
    )
    figure.add_trace(line("kl_divergence", "KL, harmless"), row=2, col=1)
    number, half = record["fragility"], record["half_fraction"]
    if half is not None:  # somewhere between these two steps
        figure.add_vrect(
            x0=record["half_after"], x1=half, fillcolor="grey", opacity=0.15, line_width=0
        )
    said = "nothing is refused" if number is None else f"fragility {number:.2f}"
    said += (
        ""
        if half is None
        else (f", half of the refusals gone between {record['half_after']:.2f} and {half:.2f}")
    )
    figure.update_layout(
        title=f"{escape(str(record['model']['id']))}: {said}",
        template="plotly_white", width=860, height=640,
        legend={"orientation": "h", "y": -0.12},
    )  # fmt: skip
    figure.update_yaxes(title_text="refusal rate", range=[-0.03, 1.03], row=1, col=1,
                        secondary_y=False)  # fmt: skip
    figure.update_yaxes(title_text="refusal score", row=1, col=1, secondary_y=True, showgrid=False)
    figure.update_yaxes(title_text="KL (nats)", row=2, col=1)
    figure.update_xaxes(title_text="share of the direction removed", row=2, col=1)
    return figure
