"""Looking at directions and models: inspect, trace, plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.analysis import direction_trace, inspection
from abliterate.analysis.trace_request import TraceRequest, check_request
from abliterate.api.directions import activations
from abliterate.api.inputs import (
    DirectionLike,
    PromptsLike,
    as_direction,
    as_prompts,
    check_arguments,
)
from abliterate.api.language_model import ModelLike, as_model
from abliterate.capacity.hardware import parse_hardware
from abliterate.capacity.resource_plan import plan_resources
from abliterate.checkpoints.checkpoint import find_checkpoint
from abliterate.errors import UsageError
from abliterate.extraction.extraction import Extraction
from abliterate.inference.interventions import check_direction
from abliterate.result_tables import to_frame, to_html, to_json
from abliterate.settings import parse_memory


@dataclass(frozen=True, repr=False)
class Inspection:
    """What candidate directions look like, layer by layer.

    Attributes:
        position: whose candidates are looked at.
        layers: by layer: norms, cosine with the selected direction, geometry, promoted tokens.
        cosines: cosine of every candidate with the selected direction, positions x layers.
        lens: tokens that the selected direction promotes and suppresses; None where no logit lens
            can be had.
        notes: what could not be seen, and why.
        document: all of it, as ``inspect.json`` names it.
    """

    position: int
    layers: tuple[dict[str, Any], ...]
    cosines: tuple[tuple[float | None, ...], ...]
    lens: Mapping[str, Any] | None
    notes: tuple[str, ...]
    document: Mapping[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer; the geometry's figures are columns of their own."""
        rows = []
        for layer in self.layers:
            plain = {k: v for k, v in layer.items() if not isinstance(v, dict | list)}
            promoted = [token["token"] for token in layer.get("promotes", ())]
            plain.pop("geometry", None)
            rows.append(plain | (layer.get("geometry") or {}) | {"promotes": " ".join(promoted)})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return to_json(self.document)

    def to_pandas(self) -> Any:
        """:meth:`rows` as a DataFrame."""
        return to_frame(self.rows())

    def __repr__(self) -> str:
        return f"Inspection(position {self.position}, {len(self.layers)} layers)"

    def _repr_html_(self) -> str:
        heads = ("layer", "cosine_with_selected", "norm", "promotes")
        rows = [{head: row.get(head) for head in heads} for row in self.rows()]
        return to_html(repr(self), rows, limit=100)


def inspect(
    model: ModelLike,
    extraction: Extraction,
    direction: DirectionLike,
    harmful: PromptsLike | None = None,
    harmless: PromptsLike | None = None,
    *,
    position: int | None = None,
) -> Inspection:
    """Describe the candidates: norms, cosines, logit lens, and PCA and separation of prompts.

    Args:
        model: the model, in memory.
        extraction: the candidates.
        direction: the selected one, or its vector ``[d_model]``.
        harmful: prompts whose activations are taken apart; without both kinds that is left out.
        harmless: the harmless ones.
        position: whose candidates and activations; None for the direction's own, or the last.

    Returns:
        Figures by layer.

    Raises:
        InputError: the direction or the candidates are another model's.
        UsageError: there are no candidates at the position, or scikit-learn is missing.

    Source:
        Sections 2.3 and 5; the logit lens of appendix B.

    Examples:
        >>> ab.inspect(lm, ex, d, harmful, harmless).layers[5]["geometry"]["auc"] > 0.9
        True
    """
    lm, along = as_model(model), as_direction(direction)
    check_arguments(extraction=extraction)
    check_direction(along.vector, lm.d_model)
    extraction.check(lm.n_layers, lm.d_model)
    own = along.position if along.position in extraction.positions else extraction.positions[-1]
    place = own if position is None else position
    if place not in extraction.positions:
        raise UsageError(f"--position {place}: there are {list(extraction.positions)}")
    if (harmful is None) != (harmless is None):
        raise UsageError("give harmful and harmless prompts, or neither")
    held = None
    if harmful is not None and harmless is not None:
        held = inspection.LayerActivations(
            _at(lm, harmful, "harmful", place), _at(lm, harmless, "harmless", place), place
        )
    materials = inspection.Materials(extraction, along, held, place)
    found = inspection.describe(lm.loaded, materials)
    notes = [] if held is None else found["notes"]
    return Inspection(
        place,
        tuple(found["layers"]),
        tuple(map(tuple, found["cosines"]["values"])),
        found["lens"],
        tuple(notes),
        found,
    )


def _at(lm: ModelLike, prompts: PromptsLike, kind: str, position: int) -> Tensor:
    return activations(lm, as_prompts(prompts, kind), position=position)


@dataclass(frozen=True, repr=False)
class Trace:
    """How prompts move along a direction, layer by layer.

    Attributes:
        cosines: by condition (``harmful``, ``harmless``, ``suffix``, ``random``): mean and standard
            deviation of the last token's cosine with the direction at every layer, and ``n``.
        heads: the attention heads whose contribution changes most with the suffix, or None.
        notes: what could not be seen, and why.
        document: all of it, as ``trace.json`` names it.
    """

    cosines: Mapping[str, Mapping[str, Any]]
    heads: tuple[dict[str, Any], ...] | None
    notes: tuple[str, ...]
    document: Mapping[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each condition and layer."""
        return [
            {"condition": name, "layer": layer, "cosine": mean, "std": std}
            for name, curve in self.cosines.items()
            for layer, (mean, std) in enumerate(zip(curve["mean"], curve["std"], strict=True))
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return to_json(self.document)

    def to_pandas(self) -> Any:
        """:meth:`rows` as a DataFrame."""
        return to_frame(self.rows())

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} n={curve['n']}" for name, curve in self.cosines.items())
        return f"Trace({counts})"

    def _repr_html_(self) -> str:
        return to_html(repr(self), self.rows(), limit=100)


def trace(
    model: ModelLike,
    direction: DirectionLike,
    harmful: PromptsLike,
    harmless: PromptsLike,
    *,
    suffix: str | None = None,
    n_heads: int = 10,
    seed: int = 0,
) -> Trace:
    """Follow prompts along a direction, with and without a suffix of yours.

    Args:
        model: the model, in memory.
        direction: a direction or its vector ``[d_model]``.
        harmful: harmful prompts; of a source its test split.
        harmless: harmless prompts.
        suffix: text to put after each harmful prompt, compared with as many random tokens.
        n_heads: how many attention heads are listed, where there is a suffix.
        seed: of the random tokens.

    Returns:
        The curves, and the heads.

    Raises:
        InputError: the direction does not fit, or there are no prompts.
        UsageError: the suffix does not reach the prompt, or the model is streamed.

    Source:
        Section 5.

    Examples:
        >>> found = ab.trace(lm, d, harmful_val[:4], harmless_val[:4])
        >>> found.cosines["harmful"]["mean"][6] > found.cosines["harmless"]["mean"][6]
        True
    """
    lm, along = as_model(model), as_direction(direction)
    check_arguments(suffix=suffix, n_heads=n_heads, seed=seed)
    check_direction(along.vector, lm.d_model)
    text = None if suffix is None else suffix.strip()
    if text == "":
        raise UsageError("--suffix holds no text")
    request = TraceRequest(suffix=text, n_heads=n_heads)
    check_request(request)
    texts = {
        kind: [prompt.text for prompt in as_prompts(given, kind, "test")]
        for kind, given in (("harmful", harmful), ("harmless", harmless))
    }
    found = direction_trace.trace(
        lm.loaded, along, texts, request, lm.chat, lm.batch_size, seed=seed
    )
    heads = found["heads"]
    return Trace(
        found["cosines"],
        None if heads is None else tuple(heads["rows"]),
        tuple(found["notes"]),
        found,
    )


@dataclass(frozen=True, repr=False)
class ResourcePlan:
    """What the stages would take.

    Attributes:
        model: folder or hub id.
        mode: how the model would be run: in memory, or streamed.
        parameters: how many the model has.
        stages: by stage: mode, passes, bytes read, FLOPs, peak memory (bytes) and seconds.
        document: all of it, as ``plan --json`` prints it.
    """

    model: str
    mode: str
    parameters: int
    stages: tuple[dict[str, Any], ...]
    document: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return to_json(self.document)

    def to_pandas(self) -> Any:
        """A row for each stage."""
        return to_frame(self.stages)

    def __repr__(self) -> str:
        return f"ResourcePlan({self.model!r}, {self.mode}, {len(self.stages)} stages)"

    def _repr_html_(self) -> str:
        return to_html(f"{self.model}: {self.mode}", self.stages)


def plan(
    model: str | Path,
    *,
    memory: str | None = None,
    gpu_memory: str | None = None,
    n_train: int = 128,
    n_val: int = 32,
    tokens: int = 32,
    positions: int = 5,
    answer_tokens: int = 512,
    machine: str | None = None,
    dtype: str = "auto",
    activation_memory: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ResourcePlan:
    """Estimate memory, time and passes of each stage from ``config.json`` and headers alone.

    Args:
        model: a folder or a hub id; no weights are read or fetched.
        memory: main memory, such as ``24GB``; None for what is free.
        gpu_memory: memory of one accelerator, ``0`` for none; None for what is there.
        n_train: training prompts per kind.
        n_val: validation prompts per kind.
        tokens: tokens of a prompt, template included.
        positions: positions that are looked at.
        answer_tokens: tokens of an answer, at most.
        machine: one that is not at hand, such as ``8x80GB``, instead of this one.
        dtype: of the computation.
        activation_memory: memory for activations of a streamed model.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: the checkpoint's own code may run.

    Returns:
        The plan; bytes, FLOPs and seconds.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        UsageError: a size or a count is none.

    Source:
        No part of the paper: its stages are those of sections 2.3 and 2.4.

    Examples:
        >>> ab.plan(M, memory="8GB", gpu_memory="8GB").mode
        'in memory'
    """
    if min(n_train, n_val, tokens, positions, answer_tokens) < 1:
        raise UsageError(
            "--n-train, --n-val, --tokens, --positions and --answer-tokens must be at least 1"
        )
    if machine is not None and gpu_memory is not None:
        raise UsageError("--machine names the accelerators: leave out --gpu-memory")

    def size(text: str | None, option: str) -> int | None:
        if text is None:
            return None
        return 0 if text.strip() == "0" else parse_memory(text, option)

    document = plan_resources(
        find_checkpoint(str(model), revision, need="headers"),
        memory=size(memory, "--memory"),
        gpu_memory=size(gpu_memory, "--gpu-memory"),
        n_train=n_train,
        n_val=n_val,
        tokens=tokens,
        positions=positions,
        answer_tokens=answer_tokens,
        hardware=None if machine is None else parse_hardware(machine),
        activation_memory=size(activation_memory, "--activation-memory"),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    return ResourcePlan(
        document["model"],
        document["mode"],
        document["parameters"],
        tuple(document["stages"]),
        document,
    )
