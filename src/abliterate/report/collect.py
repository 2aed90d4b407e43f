"""What a run folder holds for its report: the records of whatever stages are present."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.analysis.direction_trace import TRACE
from abliterate.analysis.inspection import INSPECT
from abliterate.editing.own_checkpoint import RECORD
from abliterate.errors import InputError
from abliterate.run_folder import COMPLETIONS, EVALUATION, EXTRACT, MODEL, SELECTION
from abliterate.storage.artifacts import read_json

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Completions:
    """Answers side by side.

    Attributes:
        interventions: the columns.
        rows: ``{"prompt", "category", "kind", "answers": [one per column or None]}``, harmful
            prompts first; an answer is ``{"response", "refused", "safe"}``.
    """

    interventions: tuple[str, ...]
    rows: tuple[Document, ...]


@dataclass(frozen=True)
class Run:
    """The records of a run folder, each None where its stage has not run.

    Attributes:
        folder: the run folder.
        edit_folder: where the edited checkpoint's record was found.
    """

    folder: Path
    extract: Document | None = None
    selection: Document | None = None
    inspect: Document | None = None
    trace: Document | None = None
    evaluation: Document | None = None
    edit: Document | None = None
    edit_folder: Path | None = None

    @property
    def model(self) -> str:
        """The model's name as the first record has it."""
        for record in (self.extract, self.selection, self.evaluation):
            if record is not None:
                return str(record["model"]["id"])
        return str(self.edit["source"]["id"]) if self.edit else "unknown"


def read_run(folder: Path, edited: Path | None = None) -> Run:
    """Read the records of a run folder.

    Args:
        folder: the run folder.
        edited: the edited checkpoint, if it lies elsewhere than in ``folder/model``.

    Raises:
        InputError: there is no such folder, no stage has run in it, or a record is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no run folder: run `abliterate extract MODEL -o {folder}`")
    extracted = _record(folder / EXTRACT, "extract MODEL -o RUN")
    selection = _record(folder / SELECTION, "select RUN")
    inspected = _record(folder / INSPECT, "inspect RUN")
    traced = _record(folder / TRACE, "trace RUN")
    evaluation = _record(folder / EVALUATION, "evaluate MODEL --direction RUN")
    place = edited or folder / MODEL
    edit = _record(place / RECORD, "orthogonalize")
    if edited is not None and edit is None:
        raise InputError(f"{place / RECORD} does not exist: --edited takes an edited checkpoint")
    if not any((extracted, selection, inspected, traced, evaluation, edit)):
        raise InputError(
            f"{folder} holds no stage's record: run `abliterate extract MODEL -o {folder}` first"
        )
    found = (extracted, selection, inspected, traced, evaluation, edit)
    return Run(folder, *found, place if edit else None)


def _record(path: Path, made_by: str) -> Document | None:
    if not path.is_file():
        return None
    document = read_json(path, made_by)
    if not isinstance(document, dict):
        raise InputError(f"{path} is no record: make it again with `abliterate {made_by}`")
    return document


def read_completions(run: Run) -> Completions | None:
    """The completions that the evaluation's record names; None if there are none.

    Raises:
        InputError: a file of them cannot be read.
    """
    if run.evaluation is None:
        return None
    named = run.evaluation.get("outputs", {})
    columns = tuple(run.evaluation["interventions"])
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for kind in ("harmful", "harmless"):
        for at, name in enumerate(columns):
            path = run.folder / COMPLETIONS / f"{name}-{kind}.jsonl"
            if path.name not in named or not path.is_file():
                continue
            for line in _lines(path):
                row = rows.setdefault(
                    (kind, line["prompt"]),
                    {
                        "prompt": line["prompt"],
                        "category": line.get("category"),
                        "kind": kind,
                        "answers": [None] * len(columns),
                    },
                )
                row["answers"][at] = {
                    "response": line["response"],
                    "refused": bool(line["refused"]),
                    "safe": line.get("safe"),
                }
    return Completions(columns, tuple(rows.values())) if rows else None


def _lines(path: Path) -> list[Document]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        parsed = [json.loads(line) for line in lines if line]
        if all({"prompt", "response", "refused"} <= set(line) for line in parsed):
            return parsed
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): run evaluate again") from None
    raise InputError(f"{path} holds a line that is no completion: run evaluate again")
