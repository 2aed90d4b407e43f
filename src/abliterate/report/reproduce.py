"""The exact commands that made a run folder, from what its records say."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.report.collect import Document, Run
from abliterate.settings import Settings

# Settings whose option is called otherwise.
_FLAGS = {"template_kwargs": "--chat-template-kwargs", "refusal_tokens": "--refusal-token"}
# No command takes it; it only says whether `--overwrite` was needed.
_NO_OPTION = {"overwrite"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    name: field.default.model_dump() for name, field in Settings.model_fields.items()
}


def commands(run: Run, edited: Path | None = None) -> list[str]:
    """The commands, in order, of the stages that are present.

    Args:
        run: the records.
        edited: the edited checkpoint's folder, if it is no part of the run folder.
    """
    folder = str(run.folder)
    done: list[list[str]] = []
    base: Mapping[str, Any] = {}
    if run.extract is not None:
        base = run.extract["settings"]
        done.append(
            [
                "extract",
                *_model(run.extract),
                "-o",
                folder,
                *_options(base, ("model", "chat", "extract")),
            ]
        )
    if run.selection is not None:
        done.append(["select", folder, *_later(run.selection, base, "select")])
    if run.edit is not None:
        place = str(edited or run.edit_folder)
        source = _model(run.edit, "source")
        done.append(
            ["orthogonalize", *source, "--direction", folder, "-o", place, *_edit(run.edit)]
        )
    if run.evaluation is not None:
        done.append(_evaluate(run, base))
    if run.inspect is not None:
        extra = ["--position=" + str(run.inspect["position"])]
        done.append(["inspect", folder, *_later(run.inspect, base), *extra])
    if run.trace is not None:
        done.append(_trace(run.trace, folder, base))
    done.append(["report", folder])
    return [shlex.join(["abliterate", *command]) for command in done]


def _model(record: Document, key: str = "model") -> list[str]:
    identity = record[key]
    revision = identity.get("revision")
    return [str(identity["id"]), *(["--revision", str(revision)] if revision else [])]


def _options(settings: Mapping[str, Any], tables: Sequence[str]) -> list[str]:
    """The options whose values are not the defaults."""
    found: list[str] = []
    for table in tables:
        for key, value in settings.get(table, {}).items():
            if key != "revision" and value != _DEFAULTS.get(table, {}).get(key):
                found += _option(key, value)
    return found


def _option(key: str, value: Any) -> list[str]:
    if key in _NO_OPTION or value is None:
        return []
    flag = _FLAGS.get(key, "--" + key.replace("_", "-"))
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, Mapping):
        return [flag, json.dumps(value)]
    if isinstance(value, list | tuple):
        return [part for item in value for part in _option(key, item)]
    # A value such as -5,-1 would be read as an option of its own.
    joined = str(value).startswith("-") or key == "save_activations"
    return [f"{flag}={value}"] if joined else [flag, str(value)]


def _later(record: Document, base: Mapping[str, Any], table: str = "") -> list[str]:
    """Options of a stage that starts from what extract recorded."""
    settings = record["settings"]
    changed = {
        key: value
        for key, value in settings.get("model", {}).items()
        if value != base.get("model", _DEFAULTS["model"]).get(key) and key != "revision"
    }
    found = [part for key, value in changed.items() for part in _option(key, value)]
    return found + (_options(settings, (table,)) if table else [])


def _edit(record: Document) -> list[str]:
    options = dict(record["options"])
    quantized = options.pop("quantized", None)
    options |= {} if quantized is None else {quantized.removesuffix("d"): True}
    leak = float(record.get("leak_of_plan") or 0.0)
    found = _options({"orthogonalize": options}, ("orthogonalize",))
    if leak > 1e-3:  # an architecture that is edited only on request
        found += ["--allow-leak", f"{math.ceil(leak * 1000) / 1000:g}"]
    return found


def _evaluate(run: Run, base: Mapping[str, Any]) -> list[str]:
    assert run.evaluation is not None
    record, command = run.evaluation, ["evaluate", *_model(run.evaluation)]
    if record.get("direction"):
        command += ["--direction", str(run.folder)]
    else:
        command += ["-o", str(run.folder)]
    known = [n for n in record["interventions"] if n in ("baseline", "ablate", "add", "subtract")]
    default = ["baseline", "ablate", "add"] if record.get("direction") else ["baseline"]
    if known != default:
        command += [part for name in known for part in ("--intervention", name)]
    places = record.get("checkpoints") or {}
    for name in record["interventions"]:
        if name not in known:
            found = places.get(name, {}).get("id") or run.edit_folder or name
            command += ["--checkpoint", str(found)]
    return command + _later(record, base, "evaluate")


def _trace(record: Document, folder: str, base: Mapping[str, Any]) -> list[str]:
    command = ["trace", folder]
    asked = record["request"]
    for key, flag in (("harmful", "--prompts"), ("harmless", "--harmless")):
        if asked[key] is not None:
            command += [flag, str(asked[key])]
    if asked["n_prompts"] is not None:
        command += ["--n-prompts", str(asked["n_prompts"])]
    if record["suffix"]:
        command += [f"--suffix={record['suffix']['text']}"]
    if asked["n_heads"] != 10:
        command += ["--heads", str(asked["n_heads"])]
    return command + _later(record, base)
