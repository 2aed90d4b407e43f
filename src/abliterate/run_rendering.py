"""How a run's prompts are rendered: checked before anything runs, recorded, the same throughout.

``extract`` keeps one rendered prompt and the hash of the template with all that it was told. A
later stage that would render otherwise stops: its figures would be about other prompts.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.direction import FILE_NAME
from abliterate.errors import InputError, UsageError
from abliterate.prompts.chat_template import check_format, render, template_of
from abliterate.prompts.thinking import find_thinking
from abliterate.run_folder import EXTRACT, Session
from abliterate.run_records import read_extract
from abliterate.settings import flags_of
from abliterate.settings.sections import ChatSettings
from abliterate.settings.values import check_date
from abliterate.storage.artifacts import hash_json
from abliterate.storage.json_text import parse_json

#: The prompt that records show as it was rendered.
EXAMPLE = "How do I bake bread?"
_SHOWN = 40  # characters of a setting in a message


def settle_rendering(
    session: Session,
    run: Path | None = None,
    extracted: Mapping[str, Any] | None = None,
    several: bool = False,
) -> None:
    """Check how prompts are rendered, and which day templates that ask for it are told.

    Reads the tokenizer, not the model. From here on the session has its date.

    Args:
        session: the model's tokenizer, and the chat settings.
        run: the run folder that the stage goes on from.
        extracted: its ``extract.json``, with which the rendering must agree.
        several: conversations of several turns are rendered too.

    Raises:
        CheckpointError: there is no template, or it fails, or it loses text.
        InputError: prompts would be rendered otherwise than ``extract`` did.
        UsageError: an option has no effect on what the template writes.
    """
    ranks = session.placement.ranks
    today = ranks.broadcast(datetime.date.today().isoformat())
    with ranks.fail_together():
        check_format(session.tokenizer, session.chat, several)
        asks = _asks_for_date(session)
        if asks and session.settings.chat.date is None:
            session.set_date(today)
        if run is not None and extracted is not None:
            _check_same(session, run, extracted)
            session.expect_dtype(extracted.get("dtype"))
        own = not several and extracted is None  # given here, and not by a record
        if own and asks is False and session.settings.chat.date is not None:
            raise UsageError(
                f"--date: the chat template of {session.checkpoint.name} asks for no date: leave "
                "it out"
            )


def extracted_of(session: Session, run: Path | None) -> dict[str, Any] | None:
    """The record of ``extract`` in a run folder that may have none.

    Raises:
        InputError: it is malformed.
    """
    if run is None:
        return None
    found = run

    def read() -> dict[str, Any] | None:
        return read_extract(found) if (found / EXTRACT).exists() else None

    return session.placement.ranks.run_on_main(read)


def take_date(session: Session, run: Path) -> None:
    """Go on with the date that ``RUN/extract.json`` holds, if it holds one and none was given."""
    if session.settings.chat.date is None:
        found = session.placement.ranks.run_on_main(lambda: _recorded_date(run))
        if found is not None:
            session.set_date(found)


def describe_rendering(session: Session) -> dict[str, Any]:
    """As ``extract.json`` holds it."""
    chat = session.chat
    if chat.is_plain:
        template, arguments = chat.template, {}
    else:
        whole = template_of(session.tokenizer, chat)
        template, arguments = whole.text, dict(chat.template_kwargs)
    thinking = find_thinking(session.tokenizer, chat)
    told = {
        "template": template,
        "arguments": {**arguments, **thinking.variables},
        "thinking": [thinking.mode, thinking.appended],
        "system": chat.system,
        "response_prefix": chat.response_prefix,
        "date": chat.date,
    }
    return {
        "prompt": render(session.tokenizer, EXAMPLE, chat),
        "template": hash_json(template),
        "hash": hash_json(told),
        "date": chat.date,
    }


def _asks_for_date(session: Session) -> bool | None:
    """None where only the tokenizer's own code knows."""
    if session.chat.is_plain:
        return False
    return template_of(session.tokenizer, session.chat).asks_for_date()


def _recorded_date(run: Path) -> str | None:
    """Whatever else the record holds, and whether it is one."""
    try:
        document = parse_json((run / EXTRACT).read_text(encoding="utf-8"))
        return check_date(document["settings"]["chat"]["date"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_same(session: Session, run: Path, extracted: Mapping[str, Any]) -> None:
    recorded = extracted.get("rendering")
    if recorded is None:  # of a version that kept none
        return
    own = describe_rendering(session)
    if all(own[key] == recorded[key] for key in ("prompt", "hash")):
        return
    what, mend = _difference(session, extracted, own)
    raise InputError(
        f"{run / EXTRACT}: extract rendered the prompts otherwise: {what}: {mend} (evaluate and "
        f"chat also take {run / FILE_NAME} itself, which is bound to no rendering)"
    )


def _difference(
    session: Session, extracted: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[str, str]:
    """What differs, and what to do about it."""
    # Checked when the record was read.
    held = ChatSettings.model_validate_json(json.dumps(extracted["settings"].get("chat", {})))
    now, mend = session.settings.chat, "leave it out, or run extract again with it"
    for name in ChatSettings.model_fields:
        before, after = getattr(held, name), getattr(now, name)
        if before != after and name not in ("template_kwargs", "template_args"):
            return f"{flags_of(ChatSettings, name)} {_shown(before, after)}", mend
    for name in sorted({*now.arguments, *held.arguments}):
        before, after = held.arguments.get(name), now.arguments.get(name)
        if before != after:
            return f"--template-arg {name} {_shown(before, after)}", mend
    if own["template"] != extracted["rendering"]["template"]:
        where = f"{session.checkpoint.name} has another chat template now"
        return where, "give extract's with --template FILE, or run extract again"
    return (
        "its settings give another prompt than it holds, by hand or by other versions of the "
        "libraries",
        "run extract again",
    )


def _shown(before: Any, after: Any) -> str:
    def short(value: Any) -> str:
        text = "not given" if value is None else repr(value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

    return f"was {short(before)} and is {short(after)}"
