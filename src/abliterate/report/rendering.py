"""A page of the report out of its template, with everything it needs inside."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup

from abliterate.errors import InputError
from abliterate.report.style import plotly
from abliterate.storage.artifacts import OTHER_THINGS
from abliterate.storage.ownership import GENERATOR
from abliterate.storage.web_page import content_policy, script_json


def part(file: str, make: Callable[[], Any]) -> Any:
    """A part of a page; a record that does not hold what it should is named.

    Raises:
        InputError: making it met something else in the record.
    """
    try:
        return make()
    except OTHER_THINGS as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{file} of the run folder does not hold what the report needs ({reason}): make it "
            "again with this version"
        ) from None


def packed(text: str) -> str:
    """Text compressed, as the page's script unpacks it."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


@cache
def _packed_plotly() -> str:
    return packed(plotly("offline").get_plotlyjs())


@cache
def _environment() -> Environment:
    """Of all templates, which it compiles once."""
    loader = PackageLoader("abliterate.report", "assets")
    environment = Environment(
        loader=loader, autoescape=True, undefined=ChainableUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["quoted"] = repr
    return environment


def render(
    template: str,
    page: Mapping[str, Any],
    payload: Mapping[str, Any],
    answers: str | None = None,
) -> str:
    """The page as text.

    Args:
        template: its file among the assets.
        page: what the template reads.
        payload: what the page's script works on.
        answers: the answers, packed.

    Raises:
        UsageError: plotly is missing.
    """
    bundle = plotly("offline").get_plotlyjs()
    environment = _environment()
    assert environment.loader is not None
    script, styles = (
        environment.loader.get_source(environment, name)[0] for name in ("report.js", "report.css")
    )
    rendered: str = environment.get_template(template).render(
        page,
        policy=content_policy([script, bundle]),
        generator=Markup(GENERATOR),
        script=Markup(script),
        styles=Markup(styles),
        data=Markup(script_json(payload)),
        plotly=_packed_plotly(),
        answers=answers,
    )
    return rendered
