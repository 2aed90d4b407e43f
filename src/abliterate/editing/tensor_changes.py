"""Which tensors an edited checkpoint holds in another form, and the configuration that says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from abliterate.checkpoints.compressed_tensors import METHOD
from abliterate.checkpoints.quantized_formats import Quantized, beside
from abliterate.checkpoints.shards import ShardSet
from abliterate.editing.edit_plan import EditPlan, TensorEdit
from abliterate.editing.shard_layout import NewTensor, TensorChanges
from abliterate.errors import CheckpointError

_PLAIN_MODULES = ("modules_to_not_convert", "ignored_layers")


def resolve_edits(
    edits: Sequence[TensorEdit], shards: ShardSet, quantized: Mapping[str, Quantized]
) -> tuple[TensorEdit, ...]:
    """The edits by the tensors on disk: packed matrices lie there under other names, MXFP4 ones
    transposed."""
    by_plain_name = {stored.dense[0]: stored for stored in quantized.values()}
    resolved = []
    for edit in edits:
        stored = by_plain_name.get(edit.name)
        if edit.name not in shards.tensors and stored is not None:
            if stored.scheme != "mxfp4":
                edit = replace(edit, name=stored.values.name)
            elif edit.region is not None or edit.axis not in (1, 2):
                raise CheckpointError(f"tensor '{edit.name}' cannot be edited in part")
            else:
                edit = replace(edit, name=stored.values.name, axis=3 - edit.axis)
        resolved.append(edit)
    counts = Counter(edit.name for edit in resolved)
    for edit in resolved:
        if counts[edit.name] > 1 and edit.region is None:
            raise CheckpointError(f"the plan edits tensor '{edit.name}' twice over")
    return tuple(resolved)


def plan_changes(
    plan: EditPlan,
    quantized: Mapping[str, Quantized],
    choice: str | None,
    config: Mapping[str, Any],
) -> tuple[TensorChanges, dict[str, Any] | None]:
    """What the edit adds, replaces and removes, and the configuration if that changes.

    Args:
        plan: the edits, by tensors on disk.
        quantized: the tensors stored in blocks with scales.
        choice: ``requantize``, ``dequantize`` or None.
        config: of the source.

    Raises:
        CheckpointError: an edit needs a choice that was not made.
    """
    touched = [quantized[edit.name] for edit in plan.edits if edit.name in quantized]
    changes = [_copied(plan, quantized)]
    new_config = dict(config)
    if plan.copies or plan.untied:
        new_config = untie_document(new_config, plan)
    if touched and choice is None:
        name = touched[0].values.name
        raise CheckpointError(
            f"tensor '{name}' is stored as {touched[0].scheme.upper()} with scales: pass "
            "--requantize to store it so again, or --dequantize to write it as bfloat16"
        )
    if touched and choice == "requantize":
        changes.append(_scales_beside_values(touched))
    if touched and choice == "dequantize":
        if any(edit.region is not None for edit in plan.edits if edit.name in quantized):
            raise CheckpointError("a box of a quantized tensor cannot be dequantized alone")
        modules = {_module(stored) for stored in touched}
        dense = [stored for stored in quantized.values() if _module(stored) in modules]
        changes.append(_dequantized(dense))
        new_config = _dequantized_config(
            new_config, sorted(modules), all_of_them=len(dense) == len(quantized)
        )
    return _joined(changes), new_config if new_config != config else None


def _copied(plan: EditPlan, quantized: Mapping[str, Quantized]) -> TensorChanges:
    """What an untied embedding and its output head need beside each other."""
    added: dict[str, dict[str, NewTensor]] = {}
    for name, source in plan.copies.items():
        entry = plan.shards.tensors[source]
        if source in quantized:
            raise CheckpointError(
                f"tensor '{source}' is quantized and tied to {name}: pass --tied-embeddings skip"
            )
        copy = NewTensor(entry.dtype, entry.shape, entry)
        added.setdefault(entry.file.name, {})[name] = copy
    return TensorChanges(added=added)


def _scales_beside_values(touched: Sequence[Quantized]) -> TensorChanges:
    """Values and scales are written together, so both have to lie in the values' shard."""
    added: dict[str, dict[str, NewTensor]] = {}
    removed = set()
    for stored in touched:
        scales = stored.scales
        if scales.file != stored.values.file:
            removed.add(scales.name)
            moved = NewTensor(scales.dtype, scales.shape, scales)
            added.setdefault(stored.values.file.name, {})[scales.name] = moved
    return TensorChanges(added=added, removed=removed)


def _dequantized(dense: Sequence[Quantized]) -> TensorChanges:
    """Each becomes a plain tensor in the place of its values, without scales and what goes with
    them."""
    replaced = {}
    for stored in dense:
        name, shape = stored.dense
        replaced[stored.values.name] = (name, NewTensor("BF16", shape))
    removed = {entry.name for stored in dense for entry in beside(stored)}
    return TensorChanges(replaced=replaced, removed=removed)


def _joined(changes: Sequence[TensorChanges]) -> TensorChanges:
    added: dict[str, dict[str, NewTensor]] = {}
    replaced: dict[str, tuple[str, NewTensor]] = {}
    removed: set[str] = set()
    for change in changes:
        for shard, tensors in change.added.items():
            added.setdefault(shard, {}).update(tensors)
        replaced |= change.replaced
        removed |= set(change.removed)
    return TensorChanges(added, replaced, frozenset(removed))


def untie_document(config: Mapping[str, Any], plan: EditPlan) -> dict[str, Any]:
    """``config.json`` that says that embedding and output head are two matrices."""
    parts = {
        key: part
        for key, part in config.items()
        if isinstance(part, Mapping) and ("vocab_size" in part or _is_text(key, plan.config))
    }
    untied = {key: {**part, "tie_word_embeddings": False} for key, part in parts.items()}
    return {**config, **untied, "tie_word_embeddings": False}


def _is_text(key: str, config: Any) -> bool:
    """Whether a section describes the text decoder, also where it leaves out its vocabulary."""
    text = config and config.get_text_config(decoder=True)
    return text is not None and text is not config and getattr(config, key, None) is text


def _module(stored: Quantized) -> str:
    """The module a tensor belongs to: it is loaded as one format or the other."""
    return stored.values.name.rpartition(".")[0]


def _dequantized_config(
    config: dict[str, Any], modules: list[str], all_of_them: bool
) -> dict[str, Any]:
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return config
    if all_of_them and not settings.get("kv_cache_scheme"):
        return {key: value for key, value in config.items() if key != "quantization_config"}
    # Where both are there transformers reads the first alone.
    names = ("ignore",) if settings.get("quant_method") == METHOD else _PLAIN_MODULES
    key = next((name for name in names if settings.get(name) is not None), names[0])
    kept = list(settings.get(key) or [])
    kept += [module for module in modules if module not in kept]
    return {**config, "quantization_config": {**settings, key: kept}}
