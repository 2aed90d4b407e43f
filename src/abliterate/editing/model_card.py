"""The model card of an edited checkpoint: it says plainly what was removed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from abliterate.console import safe
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.editing.edited_tensor import EditedTensor
from abliterate.models.loading import Checkpoint
from abliterate.storage.artifacts import write_atomically

_ADDED = """\
# {name}, with its refusal direction added

**This model was made to refuse more, or less, by a constant.** It is {base} with {coeff:g} times
the one direction of its residual stream that mediates refusal (Arditi et al. 2024,
[arXiv 2406.11717](https://arxiv.org/abs/2406.11717)) added as a bias.

{directions}
- Changed: {count} ({kinds}); the full list is in `abliterate.json`
- {rest}
{limits}
Made with [abliterate](https://pypi.org/project/abliterate/).
"""

_TEXT = """\
# {name}, with its refusal direction{plural} removed

**Safety refusals were removed from this model.** It is {base} with {what} It answers
requests that the original declines. Whoever deploys it is responsible for the safeguards that the
original brought along.

{directions}
- Edited tensors: {count} ({kinds}); the full list is in `abliterate.json`
- {rest}
{limits}
Made with [abliterate](https://pypi.org/project/abliterate/).
"""

# What stands in the place of one direction where each layer has its own.
_ONE = """one direction of its residual
stream, the one that mediates refusal (Arditi et al. 2024,
[arXiv 2406.11717](https://arxiv.org/abs/2406.11717)), projected out of every matrix that writes to
the stream."""
_SET = """a direction of its own for each
layer (after Arditi et al. 2024, [arXiv 2406.11717](https://arxiv.org/abs/2406.11717)) projected out
of the matrices by which that layer writes to the residual stream. No layer writes along its own
direction; other layers may, so the stream as a whole is free of none of them."""
_ONE_LINE = "- Direction: source layer {layer}, position {position}, sha256 {sha256}"
_SET_LINE = "- Directions: {count} of {n_layers} layers, sha256 {sha256}; embeddings: {outside}"


def write_model_card(
    path: Path,
    base: Checkpoint,
    direction: Direction | DirectionSet,
    edited: Sequence[EditedTensor],
    *,
    limits: Sequence[str] = (),
    adapter: bool = False,
    added: float | None = None,
    directions: DirectionSet | None = None,
) -> None:
    """Write ``README.md``; licence and languages are taken over from the source's card.

    Args:
        path: the file.
        base: the source.
        direction: what was removed or added.
        edited: the tensors.
        limits: what the edit does not promise, a sentence each.
        adapter: it is a PEFT adapter.
        added: the coefficient, if the direction was added instead.
        directions: the set that was removed, as it fits the model, if each layer lost its own.
    """
    name = base.folder.name if base.revision is None else base.name
    inherited = _inherited(base.folder / "README.md")
    data = ModelCardData(
        base_model=safe(name),
        base_model_relation="adapter" if adapter else "finetune",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["abliterated", "refusal-removed" if added is None else "refusal-steered"],
        **inherited,
    )
    kinds = Counter(tensor.kind for tensor in edited)
    rest = (
        "Everything else is byte for byte the original's (an output head that was tied to the "
        "embedding now\n  holds the original matrix itself)."
    )
    text = (_TEXT if added is None else _ADDED).format(
        coeff=added,
        rest="It is an adapter: load it onto the original with PEFT." if adapter else rest,
        limits="".join(f"- Limit: {markdown(limit)}.\n" for limit in limits),
        name=markdown(name),
        base=code(name) + ("" if base.revision is None else f" at commit {code(base.revision)}"),
        plural="" if directions is None else "s",
        what=_ONE if directions is None else _SET,
        directions=_taken_from(direction, directions),
        count=len(edited),
        kinds=", ".join(f"{count} {markdown(kind)}" for kind, count in kinds.items()),
    )
    write_atomically(path, f"---\n{data.to_yaml()}\n---\n\n{text}".encode())


def _taken_from(direction: Direction | DirectionSet, fitted: DirectionSet | None) -> str:
    """The card's line on what was removed."""
    sha256 = code(str(direction.sha256))
    if isinstance(direction, Direction):
        line = _ONE_LINE.format(layer=direction.layer, position=direction.position, sha256=sha256)
        return line + _without(direction)
    held = fitted or direction
    own = "left alone" if not held.outside.any() else "the first of these"
    outside = own if held.embedding is None or own == "left alone" else "one of their own"
    return _SET_LINE.format(
        count=len(held.layers), n_layers=len(held.vectors), sha256=sha256, outside=outside
    ) + _without(direction)


def _without(direction: Direction | DirectionSet) -> str:
    words = direction.projection.words
    return f"; without what lay along {words}" if words else ""


def markdown(text: str) -> str:
    """Text out of a record or a path as it reads in Markdown: no markup, no HTML, one line."""
    return escape(re.sub(r"([\\`*_\[\]|~$])", r"\\\1", safe(text)), quote=False)


def code(text: str) -> str:
    """``text`` as a code span, behind more backticks than it holds."""
    shown = safe(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _inherited(path: Path) -> dict[str, Any]:
    try:
        source = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card is free text; without one that can be read there is nothing to take
        return {}
    return {key: source[key] for key, usable in _TAKEN.items() if usable(source.get(key))}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


def _is_link(value: Any) -> bool:
    """A page of the web, or a file of the repository; nothing that runs when clicked."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > 500:
        return False
    return value.startswith(("https://", "http://")) or (value != "" and ":" not in value)


def _are_names(value: Any) -> bool:
    return _is_name(value) or (
        isinstance(value, list) and value != [] and all(map(_is_name, value))
    )


# Of the source's card: what is taken over, and what it must look like.
_TAKEN = {
    "license": _are_names,
    "license_name": _is_name,
    "license_link": _is_link,
    "language": _are_names,
}
