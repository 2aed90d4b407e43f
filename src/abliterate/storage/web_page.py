"""What the HTML files that we write may do: run the scripts that we put there, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from abliterate.storage.artifacts import finite
from abliterate.storage.ownership import GENERATOR

_DRAW = """
const figure = JSON.parse(document.getElementById("figure").textContent);
if (figure) Plotly.newPlot("plot", figure.data, figure.layout, {responsive: true});
"""
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
{generator}<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>h1 {{font-size: 1.2rem}} body {{font-family: system-ui, sans-serif}}</style>
</head>
<body>
{text}<div id="plot"></div>
<script type="application/json" id="figure">{data}</script>
<script>{plotly}</script>
<script>{draw}</script>
</body>
</html>
"""


def figure_page(title: str, lines: Sequence[str], figure: Any | None, plotly: str) -> str:
    """A file with a heading, some lines and one figure, under the policy of the report.

    Args:
        title: also its heading, where there are lines.
        lines: plain text.
        figure: of plotly, or None.
        plotly: the script that draws it.
    """
    data = None if figure is None else json.loads(figure.to_json())
    text = f"<h1>{escape(title)}</h1>\n" if lines else ""
    text += "".join(f"<p>{escape(line)}</p>\n" for line in lines)
    return _PAGE.format(
        generator=GENERATOR,
        policy=escape(content_policy([plotly, _DRAW])),
        title=escape(title),
        text=text,
        data=script_json(data),
        plotly=plotly,
        draw=_DRAW,
    )


def content_policy(scripts: Iterable[str]) -> str:
    """A content security policy: these scripts by their hashes, our styles, pictures made in the
    page, no request to anywhere."""
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )


def script_json(document: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(finite(document), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
