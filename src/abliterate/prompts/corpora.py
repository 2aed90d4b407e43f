"""The corpora of the capability check: plain texts, and instructions with answers.

The paper measures cross-entropy on three (appendix on model coherence; the authors'
``evaluate_loss.py`` has the sizes): a slice of the Pile, Alpaca, and the model's own baseline
completions of harmless prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from abliterate.errors import InputError, UsageError
from abliterate.prompts.sources import FILE_TYPES, TEXT_COLUMNS, read_rows, well_formed
from abliterate.storage.artifacts import hash_json

NAMES = ("pile", "alpaca", "own")
# The Pile itself is no longer distributed; the authors measure on this copy.
HUB = {"pile": "monology/pile-uncopyrighted:train", "alpaca": "tatsu-lab/alpaca:train"}
ANSWER_COLUMNS = ("output", "response", "completion", "answer")

_HUB_ID = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.\[\]%+:-]+))?"
)


@dataclass(frozen=True)
class Example:
    """One text to measure: all of it, or the answer to an instruction.

    Attributes:
        text: what is measured.
        instruction: the user's text before it, or None for plain text.
    """

    text: str
    instruction: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Texts under a name.

    Attributes:
        name: ``pile``, ``alpaca`` or ``own``.
        source: where they come from.
        examples: the texts.
    """

    name: str
    source: str
    examples: tuple[Example, ...]

    def summary(self) -> dict[str, Any]:
        """What records say of it."""
        texts = [[example.instruction, example.text] for example in self.examples]
        return {"source": self.source, "n_texts": len(texts), "sha256": hash_json(texts)}


def parse_corpora(specs: Sequence[str]) -> dict[str, str]:
    """Sources by name from ``pile``, ``alpaca``, ``own``, ``pile=SOURCE`` or ``alpaca=SOURCE``.

    Raises:
        UsageError: another name, or one given twice.
    """
    found: dict[str, str] = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if name not in NAMES or (equals and (not source or name == "own")):
            raise UsageError(
                f"--corpus must be pile, alpaca, own, pile=SOURCE or alpaca=SOURCE, not '{spec}'"
            )
        if name in found:
            raise UsageError(f"--corpus {name} is given twice")
        found[name] = source or HUB.get(name, "baseline completions")
    return found


def read_corpus(name: str, source: str, n: int, seed: int) -> Corpus:
    """At most ``n`` texts of a file or hub dataset.

    The Pile's are the first ones, Alpaca's a seeded sample of the instructions without inputs.

    Args:
        name: ``pile`` (plain texts) or ``alpaca`` (instructions with answers).
        source: a file, or ``org/name[/config][@revision][:split]``.
        n: how many.
        seed: of the sample.

    Raises:
        InputError: the source is unusable or holds no such texts.
    """
    answers = name == "alpaca"
    path = Path(source)
    if path.suffix.lower() in FILE_TYPES or path.exists():
        rows = read_rows(path, f"--corpus {name}: file")
    else:
        rows = _hub_rows(name, source, None if answers else n)
    where = f"--corpus {name}={source}"
    examples = _pairs(rows, where) if answers else _texts(rows, where)
    if not examples:
        raise InputError(f"{where} holds no texts")
    if answers and n < len(examples):
        examples = random.Random(seed).sample(examples, n)
    return Corpus(name, source, tuple(examples[:n]))


def _hub_rows(name: str, source: str, first: int | None) -> list[Any]:
    match = _HUB_ID.fullmatch(source)
    if match is None or source.startswith((".", "/", "~")):
        raise InputError(
            f"--corpus {name}={source} is neither an existing file ({', '.join(FILE_TYPES)}) nor a "
            "hub dataset (org/name:split)"
        )
    import datasets

    try:
        # Streamed: the Pile is hundreds of gigabytes and a slice of it is wanted.
        rows = datasets.load_dataset(
            match["id"],
            match["config"],
            split=match["split"] or "train",
            revision=match["revision"],
            streaming=True,
        )
        return list(rows if first is None else islice(rows, first))
    except Exception as error:  # the hub client's many error types have no narrower common base
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"--corpus {name}={source} cannot be loaded ({reason}): check the id, split and "
            f"network, or give a file as --corpus {name}=FILE"
        ) from None


def _texts(rows: Sequence[Any], where: str) -> list[Example]:
    found = []
    for number, row in enumerate(rows, 1):
        text = row if isinstance(row, str) else _cell(row, TEXT_COLUMNS, where, number)
        well_formed(text, f"{where}, entry {number}")
        if text.strip():
            found.append(Example(text))
    return found


def _pairs(rows: Sequence[Any], where: str) -> list[Example]:
    found = []
    for number, row in enumerate(rows, 1):
        instruction = _cell(row, TEXT_COLUMNS, where, number)
        answer = _cell(row, ANSWER_COLUMNS, where, number)
        needs_input = isinstance(row.get("input"), str) and row["input"].strip()
        if instruction.strip() and answer.strip() and not needs_input:
            found.append(Example(answer, instruction))
    return found


def _cell(row: Any, columns: Sequence[str], where: str, number: int) -> str:
    if isinstance(row, Mapping):
        value = next((row[column] for column in columns if column in row), None)
        if isinstance(value, str):
            return well_formed(value, f"{where}, entry {number}")
    raise InputError(f"{where}, entry {number}: no text in a column {' or '.join(columns)}")
