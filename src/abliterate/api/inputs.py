"""What users give for prompts, vectors, positions and checkpoints, as lower floors take it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abliterate.checkpoints.checkpoint import Checkpoint, find_checkpoint
from abliterate.direction import Direction
from abliterate.direction_loading import load_direction
from abliterate.errors import InputError, UsageError
from abliterate.extraction.extraction import Extraction
from abliterate.extraction.refusal_token_search import named_refusal_tokens
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.columns import texts_of
from abliterate.prompts.sampling import load_prompts, split_pool
from abliterate.prompts.sources import Prompt, PromptSource, check_prompts
from abliterate.selection.candidate_filters import Thresholds

# A list of texts, of Prompt objects or of rows with a column of prompts, or a source: its name
# (``harmful``, a file, a hub dataset).
PromptsLike = Iterable[str | Prompt] | PromptSource | str | Path
# A direction, its vector ``[d_model]`` as tensor, array or list, or the file or run folder of one.
DirectionLike = Direction | Tensor | np.ndarray[Any, Any] | Sequence[float] | str | Path


def as_prompts(given: Any, kind: str, split: str = "train") -> list[Prompt]:
    """Prompts, of a source the split that is drawn from at this stage.

    Raises:
        InputError: there are none, or the source cannot be used.
        UsageError: it is neither a list nor a source, or holds something else.
    """
    if isinstance(given, str | Path):
        return load_prompts(str(given), split)
    if isinstance(given, PromptSource):
        return split_pool(given, split)
    if given is None or isinstance(given, dict | Prompt) or not isinstance(given, Iterable):
        raise UsageError(f"the {kind} prompts must be a list or a source, not {given!r:.60}")
    if isinstance(given, Set):
        raise UsageError(f"the {kind} prompts are a set, which has no order: give a list")
    if hasattr(given, "to_dict") and hasattr(given, "columns"):  # a frame of pandas or polars
        given = given.to_dict("records")
    prompts = list(_from_rows(list(given), kind))
    check_prompts(**{kind: prompts})
    return prompts


def _from_rows(rows: Sequence[Any], kind: str) -> Iterable[Any]:
    """Texts as prompts; rows of columns (a data set's, a frame's) and conversations are read as a
    source's are, what is none of these is left for the check to name."""
    if not any(isinstance(row, Mapping) or _is_conversation(row) for row in rows):
        return [Prompt(str(row)) if isinstance(row, str) else row for row in rows]
    columns = [{"messages": row} if _is_conversation(row) else row for row in rows]
    return [Prompt(*read) for read in texts_of(columns, f"the {kind} prompts", None)]


def _is_conversation(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(isinstance(turn, Mapping) for turn in row)


def as_vector(given: Any) -> Any:
    """The vector of a direction as a tensor; what is none is for the model's own check to name."""
    if isinstance(given, str | Path):
        given = load_direction(given)
    if isinstance(given, Direction):
        return given.vector
    if isinstance(given, list | tuple) or (
        hasattr(given, "__array__") and not isinstance(given, Tensor)
    ):
        try:
            given = np.asarray(given)
        except ValueError:  # rows of several lengths
            return given
    if isinstance(given, np.ndarray):
        if given.dtype.kind not in "fiu":
            raise InputError(f"the direction must hold real numbers, not {given.dtype}")
        return torch.from_numpy(np.array(given, dtype=np.float64))
    return given


def as_direction(given: Any) -> Direction:
    """A direction with whatever is known of where it came from.

    Raises:
        InputError: it is no vector of finite numbers.
    """
    if isinstance(given, str | Path):
        return load_direction(given)
    if isinstance(given, Direction):
        return given
    vector = as_vector(given)
    if not isinstance(vector, Tensor) or vector.ndim != 1 or vector.is_complex():
        raise InputError(
            f"the direction must be a Direction, a vector [d_model] or a file, not {given!r:.60}"
        )
    return Direction(vector.detach().double())


def as_positions(given: Any) -> str:
    """Positions as the settings write them: ``post-instruction``, ``last`` or ``-5,-1``."""
    if isinstance(given, str):
        return given
    if isinstance(given, int):
        return str(given)
    try:
        return ",".join(str(int(position)) for position in given)
    except (TypeError, ValueError):
        raise UsageError(
            "the positions must be 'post-instruction', 'last' or negative numbers, not "
            f"{given!r:.60}"
        ) from None


def as_token_names(given: Any) -> list[str]:
    """Refusal tokens as texts: token strings, ids or presets.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(given, str | int):
        return [str(given)]
    if given is not None and not isinstance(given, Iterable):
        raise UsageError(f"the refusal tokens must be texts or token ids, not {given!r:.60}")
    return [str(one) for one in given or ()]


def as_token_ids(loaded: LoadedModel, given: Any) -> list[int]:
    """Ids of refusal tokens, each given as an id or as a token's text.

    Raises:
        UsageError: one is no single token.
    """
    named: list[Any] = [given] if isinstance(given, str | int) else list(given)
    if all(isinstance(one, str) for one in named):
        return named_refusal_tokens(loaded, named) if named else []
    return named


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_batch_size(value: Any) -> bool:
    return value is None or value == "auto" or _is_whole(value, 1)


def _are_names(value: Any) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value is None
    return all(isinstance(name, str) for name in value)


_FLAG = (lambda value: isinstance(value, bool)), "True or False"
_COUNT = (lambda value: _is_whole(value, 1)), "a whole number of at least 1"
_FROM_ZERO = (lambda value: _is_whole(value, 0)), "a whole number from 0 up"
_TEXT = (lambda value: isinstance(value, str)), "a text"
# What plain arguments of public functions can be, by their names.
_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "all_layers": _FLAG,
    "filter": _FLAG,
    "project_first_token": _FLAG,
    "project_harmless": _FLAG,
    "stop_at_verdict": _FLAG,
    "max_new_tokens": _COUNT,
    "n_heads": _COUNT,
    "controls": _FROM_ZERO,
    "seed": _FROM_ZERO,
    "kl_on": _TEXT,
    "search": _TEXT,
    "suffix": ((lambda value: value is None or isinstance(value, str)), "a text or None"),
    "batch_size": (_is_batch_size, "'auto' or a whole number of at least 1"),
    "chat": ((lambda value: value is None or isinstance(value, ChatFormat)), "a ChatFormat"),
    "edited": (
        (lambda value: value is None or isinstance(value, Mapping)),
        "a mapping of names to models",
    ),
    "extraction": ((lambda value: isinstance(value, Extraction)), "what ab.extract returns"),
    "interventions": (_are_names, "a list of names such as ['baseline', 'ablate']"),
    "thresholds": (
        (lambda value: value is None or isinstance(value, Thresholds)),
        "Thresholds(...)",
    ),
}


def check_arguments(**given: Any) -> None:
    """Refuse plain arguments of another kind than theirs, before a model runs.

    Raises:
        UsageError: there is one; the message names it.
    """
    for name, value in given.items():
        is_one, words = _ARGUMENTS[name]
        if not is_one(value):
            raise UsageError(f"{name} must be {words}, not {value!r:.60}")


def as_checkpoint(given: Any, revision: str | None = None) -> Checkpoint:
    """A checkpoint on disk, of its folder or hub id.

    Raises:
        CheckpointError: there is none.
        UsageError: it is something else, such as a model in memory.
    """
    if isinstance(given, Checkpoint):
        return given
    if isinstance(given, str | Path):
        return find_checkpoint(str(given), revision, need="copy")
    raise UsageError(
        f"a checkpoint is named by its folder or hub id, not by a {type(given).__name__}"
    )
