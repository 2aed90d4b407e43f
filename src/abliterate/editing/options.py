"""What an edit does beyond the paper's: which tensors, how much, and what it then promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from abliterate.checkpoints.shards import same_bytes
from abliterate.editing.edit_plan import EditPlan, TensorEdit
from abliterate.editing.layer_scale import LayerScale, read_layer_scale
from abliterate.editing.matrix_orthogonalization import Norms
from abliterate.errors import UsageError
from abliterate.models.loading import pick_device
from abliterate.settings import OrthogonalizeSettings, parse_layers

_GROUPS = {
    "attention": {"attention", "mixer"},
    "mlp": {"mlp", "expert"},
    "embedding": {"embedding", "position"},
    "mixer": {"mixer"},
    "expert": {"expert"},
    "position": {"position"},
    "other": {"other"},
}
Tied = Literal["untie", "share", "skip"]
Quantization = Literal["requantize", "dequantize"]


@dataclass(frozen=True)
class EditOptions:
    """Departures from the paper's edit, and how to carry it out.

    Attributes:
        layers: decoder blocks to edit such as ``10-25`` or ``3,5-7``, or None for all. What lies
            outside the blocks is then edited only if ``components`` names it.
        components: ``attention``, ``mlp``, ``embedding`` (comma-separated), or None for all.
        scale: 1 removes all of the direction, 0.5 half of it.
        layer_scale: what the scale is multiplied by in each layer and component; where that is 0
            nothing is edited.
        norm_preserve: ``rows`` (or True): every row of an edited matrix, as it is stored, keeps
            its norm; ``columns``: every vector along d_model does, which leaves nothing along the
            direction.
        tied_embeddings: of an embedding that is the output head too: ``untie`` gives the head a
            copy of the original, ``share`` edits both, ``skip`` neither.
        quantized: what to do with FP8, INT8 and MXFP4 tensors: ``requantize``, ``dequantize`` or
            nothing.
        add: bake in the addition of this multiple of the direction instead of its removal.
        as_lora: write a PEFT adapter instead of a checkpoint.
        leave_behind: names or patterns of safetensors files beside the weights that stay behind,
            though they write to no stream of the edited model.
        device: where to compute.
        jobs: cores to use, or None for all.
    """

    layers: str | None = None
    components: str | None = None
    scale: float = 1.0
    layer_scale: LayerScale | None = None
    norm_preserve: Norms | bool | None = None
    tied_embeddings: Tied = "untie"
    quantized: Quantization | None = None
    add: float | None = None
    as_lora: bool = False
    leave_behind: tuple[str, ...] = ()
    device: str = "cpu"
    jobs: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0:
            raise UsageError(f"--scale must be a number other than zero, not {self.scale}")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"--jobs must be at least 1, not {self.jobs}")
        if self.tied_embeddings not in ("untie", "share", "skip"):
            raise UsageError(
                f"--tied-embeddings must be untie, share or skip, not '{self.tied_embeddings}'"
            )
        if self.norm_preserve not in ("rows", "columns", True, False, None):
            raise UsageError(f"--norm-preserve must be rows or columns, not '{self.norm_preserve}'")
        removal = (
            self.layers,
            self.components,
            self.scale,
            self.layer_scale,
            self.keep_norms,
            self.tied_embeddings,
            self.quantized,
            self.as_lora,
        )
        if self.add is not None and removal != (None, None, 1.0, None, None, "untie", None, False):
            raise UsageError("--add goes with none of the options that shape the removal")
        if self.add is not None and (not math.isfinite(self.add) or self.add == 0):
            raise UsageError(f"--add must be a number other than zero, not {self.add}")
        if self.as_lora and self.keep_norms:
            raise UsageError("--as-lora cannot hold --norm-preserve: it is no low-rank update")
        parse_layers(self.layers)
        parse_components(self.components)

    @property
    def keep_norms(self) -> Norms | None:
        """Which vectors of an edited matrix keep their norm."""
        if isinstance(self.norm_preserve, bool):
            return "rows" if self.norm_preserve else None
        return self.norm_preserve

    def summary(self) -> dict[str, Any]:
        """What the record keeps of them: all on which the bytes depend."""
        return {
            "layers": self.layers,
            "components": self.components,
            "scale": self.scale,
            # Left out where there is none: records stay what they were without it.
            **({} if self.layer_scale is None else {"layer_scale": self.layer_scale.model_dump()}),
            "norm_preserve": self.keep_norms or False,
            "tied_embeddings": self.tied_embeddings,
            "quantized": self.quantized,
            "add": self.add,
            "as_lora": self.as_lora,
            "leave_behind": list(self.leave_behind),
            "device": str(pick_device(self.device)),
        }


def edit_options(settings: OrthogonalizeSettings) -> EditOptions:
    """The options that settings ask for.

    Raises:
        UsageError: they contradict each other.
    """
    if settings.requantize and settings.dequantize:
        raise UsageError("--requantize and --dequantize exclude each other")
    quantized: Quantization | None = None
    if settings.requantize:
        quantized = "requantize"
    elif settings.dequantize:
        quantized = "dequantize"
    return EditOptions(
        layers=settings.layers,
        components=settings.components,
        scale=settings.scale,
        layer_scale=(
            None if settings.layer_scale is None else read_layer_scale(Path(settings.layer_scale))
        ),
        norm_preserve=settings.norm_preserve,
        tied_embeddings=settings.tied_embeddings,
        quantized=quantized,
        add=settings.add,
        as_lora=settings.as_lora,
        leave_behind=settings.leave_behind,
        device=settings.device,
        jobs=settings.jobs,
    )


def parse_components(text: str | None) -> frozenset[str] | None:
    """The kinds of tensors that a list of components names.

    Raises:
        UsageError: a name is unknown.
    """
    if text is None:
        return None
    kinds: set[str] = set()
    for part in text.split(","):
        if part.strip() not in _GROUPS:
            raise UsageError(f"--components knows {', '.join(_GROUPS)}, not '{part.strip()}'")
        kinds |= _GROUPS[part.strip()]
    return frozenset(kinds)


def named_layers(text: str | None, last: int, option: str = "--layers") -> frozenset[int] | None:
    """The layers that ``option`` names, of a model whose last one is ``last``; None for all.

    Raises:
        UsageError: the model has not all of them.
    """
    layers = parse_layers(text, option)
    if layers is not None and max(layers) > last:
        raise UsageError(f"{option} {text}: the model has layers 0 to {last}")
    return layers


def apply_options(plan: EditPlan, options: EditOptions) -> EditPlan:
    """The part of the plan that the options leave.

    Raises:
        UsageError: nothing is left, or a layer does not exist.
    """
    kinds = parse_components(options.components)
    last = max((edit.layer for edit in plan.edits if edit.layer is not None), default=-1)
    layers = named_layers(options.layers, last)

    def wanted(edit: TensorEdit) -> bool:
        if kinds is not None and edit.kind not in kinds:
            return False
        if edit.layer is None:
            return layers is None or kinds is not None
        return layers is None or edit.layer in layers

    edits = tuple(edit for edit in plan.edits if wanted(edit))
    heads = plan.heads
    if (scales := options.layer_scale) is not None:
        beyond = [layer for layer in scales.named() if layer > last]
        if beyond:
            raise UsageError(
                f"--layer-scale names layer {beyond[0]}: the model has layers 0 to {last}"
            )
        weighted = (
            [replace(edit, weight=scales.weight(edit.kind, edit.layer)) for edit in some]
            for some in (edits, heads)
        )
        edits, heads = (tuple(edit for edit in some if edit.weight != 0) for some in weighted)
    copies, tied = plan.copies, plan.tied | set(plan.copies.values())
    if options.tied_embeddings == "skip":
        edits = tuple(edit for edit in edits if edit.name not in tied)
    shared = options.tied_embeddings == "share"
    edited = any(edit.name in tied for edit in edits)
    if options.tied_embeddings != "untie" or not edited:
        copies = {}
    # Both are stored: as they were they may differ, and an edit of one alone makes sure of it.
    untied = bool(plan.heads) and edited and not shared
    untied = untied or not tied_matrices_agree(plan)
    if shared and edited:  # under the names that they have
        as_stored = (replace(edit, name=edit.source, stored_as=None) for edit in edits)
        edits = (*as_stored, *heads)
    if not edits:
        raise UsageError("no tensor is left to edit: widen --layers and --components")
    return replace(plan, edits=edits, copies=copies, untied=untied)


def _undirected_layers(plan: EditPlan) -> str:
    """Layers for which the set holds no direction."""
    assert plan.directions is not None
    there = plan.directions.layers
    missing = [str(layer) for layer in range(plan.n_layers) if layer not in there]
    missing += [] if plan.directions.outside.any() else ["embeddings"]
    return ", ".join(missing)


def tied_matrices_agree(plan: EditPlan) -> bool:
    """Whether an output head that is stored beside its tied embedding holds the same bytes.

    True where the files hold one matrix for both, or where nothing is tied.
    """
    tensors = plan.shards.tensors
    embeddings = [tensors[edit.source] for edit in plan.edits if edit.name in plan.tied]
    heads = [tensors[edit.name] for edit in plan.heads]
    if not all(entry.file.is_file() for entry in (*embeddings, *heads)):
        return False  # still on the hub: to say that they are two is right in any case
    return all(same_bytes(one, other) for one, other in zip(embeddings, heads, strict=False))


def promise(plan: EditPlan, edits: Sequence[TensorEdit], options: EditOptions) -> dict[str, Any]:
    """What a check of the edited checkpoint may expect, and why it is less than the paper's edit.

    Args:
        plan: of the whole edit.
        edits: those that were carried out.
        options: which led to them.
    """
    if options.add is not None:
        return {
            "tensors_orthogonal": False,
            "stream_orthogonal": False,
            "remaining_share": None,
            "limits": [f"{options.add:g} times the direction is added, nothing is removed"],
        }
    less = []
    if plan.directions is not None:
        less.append(
            "each layer lost its own direction alone: what other layers write along it is still in "
            "the stream"
        )
    if plan.undirected:
        less.append(
            f"{len(plan.undirected)} writers are as they were: the set holds no direction for "
            f"their layers ({_undirected_layers(plan)})"
        )
    done = {(edit.source, edit.region) for edit in edits}
    kept = sum((edit.source, edit.region) not in done for edit in plan.edits)
    if kept:
        less.append(
            f"{kept} of {len(plan.edits)} writers are as they were: the "
            "stream still holds what they write along the direction"
        )
    if options.scale != 1:
        less.append(
            f"scale {options.scale:g}: each edited tensor keeps {1 - options.scale:g} of what it "
            "had along the direction"
        )
    if options.layer_scale is not None and any(e.weight != 1 for e in edits):
        less.append(
            "weights by layer and component "
            f"({min(e.weight for e in edits):g} to {max(e.weight for e in edits):g} of the scale): "
            "each edited tensor keeps the rest of what it had along the direction"
        )
    if options.keep_norms == "rows":
        less.append(
            "rows keep their norm: a matrix whose rows do not lie along the stream is rescaled "
            "after the projection and writes along the direction again, by 'after' of its entry"
        )
    if plan.tied and options.tied_embeddings == "share":
        less.append("the output head is edited with the embedding: logits differ from ablation's")
    if options.quantized == "requantize":
        less.append(
            "requantized tensors are rounded again: 'after' of each entry is what that left"
        )
    clean = options.keep_norms != "rows" and options.quantized != "requantize"
    return {
        "tensors_orthogonal": clean and all(options.scale * e.weight == 1 for e in edits),
        "stream_orthogonal": not less,
        **({} if plan.directions is None else {"by_layer": True}),
        "remaining_share": 1 - options.scale,
        "limits": less,
    }
