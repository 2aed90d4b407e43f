"""The corpora of the capability check: plain texts, and instructions with answers.

The paper measures cross-entropy on three (appendix on model coherence; the authors'
``evaluate_loss.py`` has the sizes): a slice of the Pile, Alpaca, and the model's own baseline
completions of harmless prompts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.errors import InputError, UsageError
from abliterate.prompts.columns import TEXT_COLUMNS, well_formed
from abliterate.prompts.hub_datasets import HubDataset, HubDatasetError
from abliterate.prompts.row_files import FILE_TYPES, read_rows
from abliterate.storage.artifacts import hash_json

NAMES = ("pile", "alpaca", "own")
# The Pile itself is no longer distributed; the authors measure on this copy.
HUB = {"pile": "monology/pile-uncopyrighted:train", "alpaca": "tatsu-lab/alpaca:train"}
ANSWER_COLUMNS = ("output", "response", "completion", "answer")


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
    sources: dict[str, str] = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if name not in NAMES or (equals and (not source or name == "own")):
            raise UsageError(
                f"--corpus must be pile, alpaca, own, pile=SOURCE or alpaca=SOURCE, not '{spec}'"
            )
        if name in sources:
            raise UsageError(f"--corpus {name} is given twice")
        sources[name] = source or HUB.get(name, "baseline completions")
    return sources


def read_corpus(
    name: str, source: str, n: int, seed: int, commits: MutableMapping[str, str] | None = None
) -> Corpus:
    """At most ``n`` texts of a file or hub dataset.

    The Pile's are the first ones, Alpaca's a seeded sample of the instructions without inputs.

    Args:
        name: ``pile`` (plain texts) or ``alpaca`` (instructions with answers).
        source: a file, or ``org/name[/config][@revision][:split]``.
        n: how many.
        seed: of the sample.
        commits: as of :func:`~abliterate.prompts.sources.read_source`.

    Raises:
        InputError: the source is unusable or holds no such texts.
    """
    answers = name == "alpaca"
    path = Path(source)
    if path.suffix.lower() in FILE_TYPES or path.exists():
        rows = read_rows(path, f"--corpus {name}: file")
    else:
        rows = _hub_rows(name, source, None if answers else n, {} if commits is None else commits)
    corpus = f"--corpus {name}={source}"
    examples = _pairs(rows, corpus) if answers else _texts(rows, corpus)
    if not examples:
        raise InputError(f"{corpus} holds no texts")
    if answers and n < len(examples):
        examples = random.Random(seed).sample(examples, n)
    return Corpus(name, source, tuple(examples[:n]))


def _hub_rows(
    name: str, source: str, count: int | None, commits: MutableMapping[str, str]
) -> list[Any]:
    dataset = HubDataset.parse(source)
    if dataset is None:
        raise InputError(
            f"--corpus {name}={source} is neither an existing file ({', '.join(FILE_TYPES)}) nor a "
            "hub dataset (org/name:split)"
        )
    try:
        return dataset.first_rows(count, commits)
    except HubDatasetError as error:
        raise InputError(
            f"--corpus {name}={source} cannot be loaded: {error} (a file may be given as "
            f"--corpus {name}=FILE)"
        ) from None


def _texts(rows: Sequence[Any], where: str) -> list[Example]:
    examples = []
    for number, row in enumerate(rows, 1):
        text = row if isinstance(row, str) else _cell(row, TEXT_COLUMNS, where, number)
        well_formed(text, f"{where}, entry {number}")
        if text.strip():
            examples.append(Example(text))
    return examples


def _pairs(rows: Sequence[Any], where: str) -> list[Example]:
    examples = []
    for number, row in enumerate(rows, 1):
        instruction = _cell(row, TEXT_COLUMNS, where, number)
        answer = _cell(row, ANSWER_COLUMNS, where, number)
        needs_input = isinstance(row.get("input"), str) and row["input"].strip()
        if instruction.strip() and answer.strip() and not needs_input:
            examples.append(Example(answer, instruction))
    return examples


def _cell(row: Any, columns: Sequence[str], where: str, number: int) -> str:
    if isinstance(row, Mapping):
        value = next((row[column] for column in columns if column in row), None)
        if isinstance(value, str):
            return well_formed(value, f"{where}, entry {number}")
    raise InputError(f"{where}, entry {number}: no text in a column {' or '.join(columns)}")
