"""Servers whose models answer in place of checkpoints here, and which rows they answer.

``--server URL`` answers the baseline, ``--server ROW=URL`` the row of ``--checkpoint ROW=DIR``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from abliterate.console import hide
from abliterate.errors import UsageError
from abliterate.evaluation.endpoints import import_openai
from abliterate.evaluation.intervention_names import INTERVENTIONS
from abliterate.settings import Settings, public_url
from abliterate.settings.values import split_server

BASELINE = "baseline"


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, ``transformers serve``);
    key in OPENAI_API_KEY.

    Attributes:
        url: base URL, up to and with ``/v1``.
        model: the name that it serves the model under.
        timeout: seconds for one attempt, from the connection to the last byte of the answer.
        retries: further attempts after a time-out, a lost connection, a 408, 409, 429 or 5xx.
        concurrency: requests at once.
        chat: it is sent messages, not prompts as they are rendered here.
    """

    url: str = field(repr=False)
    model: str
    timeout: float = 600.0
    retries: int = 4
    concurrency: int = 8
    chat: bool = False

    @property
    def place(self) -> str:
        """The address as messages and records have it."""
        return public_url(self.url)

    def summary(self) -> dict[str, Any]:
        """What records say of it; greedy answers of servers with the same summary are the same."""
        api = "chat" if self.chat else "completions"
        return {"url": self.place, "model": self.model, "api": api, "temperature": 0}


def find_servers(
    settings: Settings, rows: Sequence[str], edited: Collection[str]
) -> dict[str, Server]:
    """The servers that the settings name, by the row whose answers they make.

    Args:
        settings: all of them.
        rows: of the evaluation.
        edited: those of ``--checkpoint``.

    Raises:
        UsageError: an address is none, a row cannot be served, or a name is missing.
    """
    asked = settings.evaluate
    urls: dict[str, str] = {}
    for spec in asked.server:
        named, url = split_server(spec)
        row = BASELINE if named is None else named
        _check_row(row, url, rows, edited)
        if row in urls:
            raise UsageError(f"--server answers {row} twice: give one server for a row")
        urls[row] = url
    if asked.server_api == "chat":
        _check_chat(settings, urls)
    models = _served_models(asked.served_model, urls)
    found = {}
    for row, url in urls.items():
        if row not in models:
            form = "NAME" if row == BASELINE else f"{row}=NAME"
            raise UsageError(
                f"--server {public_url(url)} needs --served-model {form} beside it: the name under "
                "which it serves the model"
            )
        _check_address(url)
        found[row] = Server(
            url,
            models[row],
            asked.server_timeout,
            asked.server_retries,
            asked.concurrency,
            asked.server_api == "chat",
        )
    return found


def _check_chat(settings: Settings, urls: Collection[str]) -> None:
    """Refuse what the messages of a chat cannot say."""
    if not urls:
        raise UsageError("--server-api needs --server beside it")
    given = {
        "--template": settings.chat.template,
        "--response-prefix": settings.chat.response_prefix,
    }
    for option, value in given.items():
        if value:
            raise UsageError(
                f"{option} has no effect with --server-api chat, where the server's own template "
                "renders the prompt: leave one of the two out"
            )


def _check_row(row: str, url: str, rows: Sequence[str], edited: Collection[str]) -> None:
    place = public_url(url)
    if row in INTERVENTIONS and row != BASELINE:
        raise UsageError(
            f"--server {row}={place}: hooks run here, on the model itself: a server answers the "
            "baseline or a --checkpoint"
        )
    if row != BASELINE and row not in edited:
        raise UsageError(
            f"--server {row}={place}: no --checkpoint has that name: give --checkpoint {row}=DIR"
        )
    if row not in rows:
        raise UsageError(
            f"--server: {row} is none of the rows: add --intervention "
            f"{BASELINE if row == BASELINE else 'checkpoint'}, or leave the server out"
        )


def _served_models(specs: Sequence[str], urls: Mapping[str, str]) -> dict[str, str]:
    """The names of models by row: ``NAME``, or ``ROW=NAME`` of a row that a server answers."""
    if specs and not urls:
        raise UsageError("--served-model needs --server beside it")
    models: dict[str, str] = {}
    for spec in specs:
        row, equals, name = spec.partition("=")
        if not (equals and row in urls):
            row, name = BASELINE, spec
        if row not in urls:
            raise UsageError(
                f"--served-model {spec}: no --server answers the baseline: give ROW=NAME, of "
                f"{', '.join(urls)}"
            )
        if not name.strip() or row in models:
            what = "names no model" if not name.strip() else f"names the model of {row} twice"
            raise UsageError(f"--served-model {spec}: it {what}")
        models[row] = name
    return models


def _check_address(url: str) -> None:
    import_openai("--server")
    from abliterate.evaluation.endpoint_client import check_url, secrets_in

    check_url(url, "--server")
    hide(*secrets_in(url))
