"""Prompt sources: a bundled set, a preset, a file or a Hugging Face dataset, read into prompts.

The grammar of a source is ``NAME``, ``PATH[:split]`` or ``org/name[/config][@revision][:split]``,
each with an optional ``[column]`` at the end. A split may be sliced as ``datasets`` writes it:
``train[:400]``, ``train[10%:20%]``, ``train+test``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from abliterate.errors import InputError, UsageError, first_line
from abliterate.prompts.columns import texts_of
from abliterate.prompts.dataset_folders import configurations, read_folder
from abliterate.prompts.hub_datasets import HubDataset, HubDatasetError
from abliterate.prompts.row_files import FILE_TYPES, read_splits
from abliterate.resources import data_dir

SPLITS = ("train", "val", "test")
BUNDLED = ("harmful", "harmless")
# Bundled too: harmless prompts that look harmful, for tests only, in one split.
BORDERLINE = "borderline"

# The public sets of the paper (section 2.1 and appendix A), as hub ids. Some are gated: accept
# their terms on the hub and pass a token in HF_TOKEN.
PRESETS = {
    "advbench": "walledai/AdvBench:train[prompt]",
    "jailbreakbench": "JailbreakBench/JBB-Behaviors/behaviors:harmful[Goal]",
    "jailbreakbench-benign": "JailbreakBench/JBB-Behaviors/behaviors:benign[Goal]",
    "harmbench": "walledai/HarmBench/standard:train[prompt]",
    "maliciousinstruct": "walledai/MaliciousInstruct:train[prompt]",
    "strongreject": "walledai/StrongREJECT:train[prompt]",
    "tdc2023": "walledai/TDC23-RedTeaming:train[prompt]",
    "alpaca": "tatsu-lab/alpaca:train[instruction]",
    # Harmless prompts that look harmful (arXiv 2308.01263 and 2405.20947).
    "xstest": "Paul/XSTest:train[prompt]",
    "orbench-hard": "bench-llm/or-bench/or-bench-hard-1k:train[prompt]",
}

_COLUMN = re.compile(r"(?P<rest>.+)\[(?P<column>[^\[\]]+)\]", re.DOTALL)
_SLICE = re.compile(r"-?\d*%?:-?\d*%?")
# One split, or several with +, each whole or sliced.
_SPLIT = re.compile(r"[\w.-]+(\[[\d:%-]*\])?(\+[\w.-]+(\[[\d:%-]*\])?)*(\(\w+\))?")
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/(?P<id>[\w.-]+/[\w.-]+)"
)


@dataclass(frozen=True)
class Prompt:
    """One instruction, with its category where the source has one."""

    text: str
    category: str | None = None


def check_prompts(**kinds: Sequence[Prompt]) -> None:
    """Refuse what are no prompts before a model runs on them.

    Args:
        kinds: lists of prompts, by what an error calls them.

    Raises:
        InputError: a list is empty.
        UsageError: something in it is no :class:`Prompt` with a text.
    """
    for kind, prompts in kinds.items():
        if isinstance(prompts, str | Prompt):
            raise UsageError(f"the {kind} prompts must be a list, not {prompts!r:.60}")
        if not prompts:
            raise InputError(f"there are no {kind} prompts: give at least one")
        for prompt in prompts:
            if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
                raise UsageError(
                    f"the {kind} prompts must be texts or Prompt objects, not {prompt!r:.60}"
                )


@dataclass(frozen=True)
class PromptSource:
    """What a source held.

    Attributes:
        spec: the source as the user named it.
        origin: ``bundled``, ``file`` or ``hub``.
        splits: prompts by split; a source without splits of its own has the one split ``all``.
        commit: of the hub data set that it is.
    """

    spec: str
    origin: str
    splits: Mapping[str, tuple[Prompt, ...]] = field(repr=False)
    commit: str | None = None


def is_contrast(prompt: Prompt) -> bool:
    """Whether a prompt is one of the harmful ones that XSTest sets beside its harmless ones."""
    category = (prompt.category or "").strip().lower()
    return category.startswith("contrast_") or category == "unsafe"


def read_source(spec: str, commits: MutableMapping[str, str] | None = None) -> PromptSource:
    """Read every prompt of a source, duplicates included.

    Args:
        spec: the source.
        commits: commits of hub data sets by ``org/name[@revision]``: one that is there is read
            from, and one that had to be looked up is added.

    Raises:
        InputError: it does not exist, is empty, is damaged, or has no column of prompts.
    """
    if not spec.strip():
        raise InputError("the prompt source is empty: name a set, a file or a hub dataset")
    if spec in BUNDLED:
        folder = data_dir() / "prompts" / spec
        splits = {name: _bundled(folder / f"{name}.jsonl") for name in SPLITS}
        return PromptSource(spec, "bundled", splits)
    if spec == BORDERLINE:
        path = data_dir() / "prompts" / f"{spec}.jsonl"
        return PromptSource(spec, "bundled", {"all": _bundled(path)})
    place, column = cut_column(PRESETS.get(spec.lower(), spec))
    if (page := _HUB_PAGE.match(place)) is not None:
        raise InputError(f"prompt source '{spec}' is a page of the hub: write {page['id']}")
    if "://" in place:
        raise InputError(f"prompt source '{spec}' is an address: download it and name the file")
    path, split = _cut_split(place)
    if path.suffix.lower() in FILE_TYPES or path.exists() or _names_configuration(path):
        return PromptSource(spec, "file", {"all": _prompts_of(path, split, column)})
    if (dataset := HubDataset.parse(place)) is not None:
        found: MutableMapping[str, str] = {} if commits is None else commits
        prompts = _read_hub(spec, dataset, column, found)
        if spec.lower() == "xstest":
            prompts = tuple(prompt for prompt in prompts if not is_contrast(prompt))
        return PromptSource(spec, "hub", {"all": prompts}, found[dataset.name])
    if HubDataset.parse(place.rstrip("/")) is not None:
        raise InputError(
            f"prompt source '{spec}': there is no such folder; a dataset of the hub is written "
            f"{place.rstrip('/')}"
        )
    known = ", ".join((*BUNDLED, BORDERLINE, *PRESETS))
    raise InputError(
        f"prompt source '{spec}' is neither a set ({known}), an existing file "
        f"({', '.join(FILE_TYPES)}) or dataset folder nor a hub dataset (org/name:split[column])"
    )


def cut_column(spec: str) -> tuple[str, str | None]:
    """A source without its column: ``[:400]`` slices its split, any other bracket names one."""
    match = _COLUMN.fullmatch(spec)
    # A file may itself be called `x[1].txt`: its brackets name no column then.
    if match is None or _SLICE.fullmatch(match["column"]) or Path(spec).exists():
        return spec, None
    return match["rest"], match["column"]


def _cut_split(place: str) -> tuple[Path, str | None]:
    """A path without its split, which is what follows the last colon behind something that is."""
    path = Path(place).expanduser()
    before, colon, split = _last_colon(place)
    held = Path(before).expanduser()
    is_one = held.suffix.lower() in FILE_TYPES or held.exists() or _names_configuration(held)
    if not colon or path.exists() or not is_one:
        return path, None
    if not _SPLIT.fullmatch(split):
        raise InputError(f"{held} has no split '{split}': write one as {held}:train[:400]")
    return held, split


def _last_colon(place: str) -> tuple[str, str, str]:
    """Cut at the last colon outside brackets: ``train[:2]`` has one of its own."""
    bare = re.sub(r"\[[^\]]*\]", lambda slice_: "x" * len(slice_[0]), place)
    index = bare.rfind(":")
    return (place, "", "") if index < 0 else (place[:index], ":", place[index + 1 :])


@cache
def _bundled(path: Path) -> tuple[Prompt, ...]:
    """A file of the package, which every kind, split and stage of a run asks for again."""
    return _prompts_of(path, None, None)


def _prompts_of(path: Path, split: str | None, column: str | None) -> tuple[Prompt, ...]:
    """The prompts of a file or folder, of one of its splits where it has several."""
    of_folder = _names_configuration(path)
    is_folder = path.is_dir() or of_folder
    what = "dataset folder" if is_folder else "prompt file"
    if of_folder:
        splits = read_folder(path.parent, path.name)
    else:
        splits = read_folder(path) if is_folder else read_splits(path)
    rows = _chosen(splits, split, what, path)
    prompts = _to_prompts(rows, str(path), column)
    if not prompts:
        raise InputError(f"{what} {path} holds no prompts")
    return prompts


def _names_configuration(path: Path) -> bool:
    """Whether a path is that of no file, but a folder's data set with one of its configurations."""
    return not path.exists() and path.parent.is_dir() and path.name in configurations(path.parent)


def _chosen(splits: Mapping[str, list[Any]], split: str | None, what: str, path: Path) -> list[Any]:
    """The rows of a split or of slices of some; of none named, the train split or the only one."""
    where = f"{what} {path}"
    if split is None:
        name = "train" if "train" in splits else next(iter(splits))
        if len(splits) > 1 and name != "train":
            raise InputError(f"{where} has splits ({', '.join(splits)}): name one as {path}:SPLIT")
        return splits[name]
    if split in splits:
        return splits[split]
    import datasets

    try:
        sizes = {name: len(rows) for name, rows in splits.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
        return [row for part in parts for row in splits[part.splitname][part.from_ : part.to]]
    except (ValueError, AssertionError, KeyError) as error:
        raise InputError(
            f"{where} has no '{split}' ({first_line(error)}; it has: {', '.join(splits)})"
        ) from None


def _read_hub(
    spec: str, dataset: HubDataset, column: str | None, commits: MutableMapping[str, str]
) -> tuple[Prompt, ...]:
    try:
        rows = dataset.rows(commits)
    except HubDatasetError as error:
        raise InputError(f"prompt source '{spec}' cannot be loaded: {error}") from None
    # Alpaca-style rows whose instruction needs a separate input are no prompts of their own (paper,
    # appendix A: "instructions without inputs").
    rows = [row for row in rows if not (isinstance(row.get("input"), str) and row["input"].strip())]
    prompts = _to_prompts(rows, f"hub dataset '{spec}'", column)
    if not prompts:
        raise InputError(f"hub dataset '{spec}' holds no prompts")
    return prompts


def _to_prompts(rows: list[Any], where: str, column: str | None) -> tuple[Prompt, ...]:
    return tuple(Prompt(text, category) for text, category in texts_of(rows, where, column))
