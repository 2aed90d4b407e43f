"""inspect: what the candidate directions look like, layer by layer -> ``RUN/inspect.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.analysis.held_out import held_out_record, held_out_separation
from abliterate.analysis.inspection_record import PERMUTATIONS, find_held_out, inspection_inputs
from abliterate.console import log
from abliterate.direction import Direction
from abliterate.direction_loading import load_direction
from abliterate.errors import InputError, UnsupportedArchitectureError, UsageError
from abliterate.extraction.extraction import Extraction
from abliterate.extraction.kept_activations import Activations
from abliterate.inference.in_memory import engine_of
from abliterate.inference.interventions import check_direction
from abliterate.inference.logit_lens import Promoted, extremes, logit_lens
from abliterate.metrics.geometry import Geometry, measure
from abliterate.metrics.label_permutations import permutation_null
from abliterate.models.loading import LoadedModel
from abliterate.prompts.sources import Prompt
from abliterate.run_folder import ACTIVATIONS, DIRECTIONS, EXTRACT, INSPECT, Session
from abliterate.run_records import read_bootstrap, read_extract, recorded_stability
from abliterate.run_rendering import settle_rendering
from abliterate.run_stage import Stage
from abliterate.storage.artifacts import hash_file

INSPECT_STAGE = Stage("inspect", INSPECT, sections=frozenset({"model", "chat"}), reads_only=True)
# Tokens listed for the selected direction, and for every layer's own.
_TOKENS, _LAYER_TOKENS = 20, 5


@dataclass(frozen=True)
class LayerActivations:
    """``resid_pre`` of both kinds of prompts at one position, ``[n, n_layers, d_model]`` each."""

    harmful: Tensor
    harmless: Tensor
    position: int

    @property
    def layers(self) -> Sequence[int]:
        return range(self.harmful.shape[1])

    def at(self, layer: int, position: int) -> tuple[Tensor, Tensor]:
        """Harmful and harmless vectors ``[n, d_model]`` of a layer."""
        assert position == self.position
        return self.harmful[:, layer], self.harmless[:, layer]


@dataclass(frozen=True)
class Materials:
    """What a run folder holds for ``inspect``.

    Attributes:
        extraction: the candidates.
        direction: the selected one.
        activations: per-prompt vectors, or None if they were not kept.
        position: whose activations and candidates are looked at.
    """

    extraction: Extraction
    direction: Direction
    activations: Activations | LayerActivations | None
    position: int

    @property
    def candidates(self) -> Tensor:
        """The directions at the position, float64 ``[n_layers, d_model]``."""
        return self.extraction.directions[self.extraction.positions.index(self.position)]


def inspect_stage(session: Session, run: Path, position: int | None = None) -> dict[str, Any]:
    """Describe the geometry of a run's directions; returns the record ``inspect.json``.

    Args:
        session: the model of the run, for the logit lens.
        run: the run folder, selected.
        position: whose activations to look at, counted from the prompt's end; the last kept one.

    Raises:
        InputError: an artifact is missing, damaged, or not of this extraction.
        UsageError: the position was not kept, or scikit-learn is missing.
    """
    with INSPECT_STAGE.open(session, run) as stage:
        extracted = read_extract(run)
        settle_rendering(session, run, extracted)
        materials = _materials(run, extracted, position)
        bootstrap = read_bootstrap(run)
        described = describe(session.load_in_memory(), materials, session.settings.model.seed)
        drawn, problem = find_held_out(session, run)
        held_out, prompts, unfinished = _held_out(session, drawn, materials)
        described["notes"] += problem + unfinished
        for note in described["notes"]:
            log.info("%s", note)
        stage.depends_on(
            inspection_inputs(
                extracted,
                materials.direction.sha256,
                materials.position,
                materials.activations is not None,
                bootstrap,
                drawn,
            )
        )
        layers = [
            row
            | _stability(extracted, materials.position, row["layer"])
            | {"held_out": held_out[row["layer"]]}
            for row in described["layers"]
        ]
        return stage.finish(
            described
            | {
                "made_from": _made_from(run, materials),
                "bootstrap": bootstrap,
                "layers": layers,
                "held_out": held_out_record(prompts),
                "permutations": {"n": PERMUTATIONS, "seed": session.settings.model.seed},
            }
        )


def describe(loaded: LoadedModel, materials: Materials, seed: int = 0) -> dict[str, Any]:
    """The geometry of candidates and their logit lens, as records hold them.

    Args:
        loaded: the model in memory.
        materials: candidates, the selected direction, and activations where they were kept.
        seed: of the permutations.

    Raises:
        UsageError: scikit-learn is missing, or the model is streamed.
    """
    geometry, notes = _geometry(materials, seed)
    lens, problem = _lens(loaded, materials)
    return {
        "direction": materials.direction.summary(),
        "position": materials.position,
        "cosines": _cosines(materials),
        "layers": [
            row | {"geometry": geometry.get(row["layer"])} | lens["layers"].get(row["layer"], {})
            for row in _layers(materials)
        ],
        "lens": lens["direction"],
        "projections": geometry["projections"],
        "notes": [*notes, *problem],
    }


def _materials(run: Path, extracted: Mapping[str, Any], position: int | None) -> Materials:
    extraction = Extraction.load(run / DIRECTIONS, extracted)
    direction = load_direction(run, winner=True)
    check_direction(direction.vector, extraction.mean_harmful.shape[-1])
    path = run / ACTIVATIONS
    activations = Activations.open(path) if path.is_file() else None
    if activations and extracted["outputs"].get(ACTIVATIONS) != hash_file(path):
        raise InputError(
            f"{path} is not what {run / EXTRACT} records: run `abliterate extract` with "
            "--save-activations again"
        )
    kept = activations.positions if activations else extraction.positions
    usual = kept[-1] if activations or direction.position is None else direction.position
    chosen = usual if position is None else position
    if chosen not in kept:
        hint = (
            ""
            if chosen not in extraction.positions
            else (
                "; keep it with `abliterate extract --save-activations --activation-positions all`"
            )
        )
        raise UsageError(f"--position {chosen}: {run} holds {', '.join(map(str, kept))}{hint}")
    return Materials(extraction, direction, activations, chosen)


def _made_from(run: Path, materials: Materials) -> dict[str, Any]:
    made = {"candidates": hash_file(run / DIRECTIONS)}
    return (
        made
        if materials.activations is None
        else made | {"activations": hash_file(run / ACTIVATIONS)}
    )


def _layers(materials: Materials) -> list[dict[str, Any]]:
    """Norms and cosines of each layer's candidate."""
    row = materials.extraction.positions.index(materials.position)
    selected = materials.direction.vector
    return [
        {
            "layer": layer,
            "cosine_with_selected": _cosine(candidate, selected),
            "norm": float(candidate.norm()),
            "norm_mean_harmful": float(materials.extraction.mean_harmful[row, layer].norm()),
            "norm_mean_harmless": float(materials.extraction.mean_harmless[row, layer].norm()),
        }
        for layer, candidate in enumerate(materials.candidates)
    ]


def _stability(extracted: Mapping[str, Any], position: int, layer: int) -> dict[str, float | None]:
    held = recorded_stability(extracted, position, layer)
    return {name: held[name] for name in ("split_half_cosine", "norm_standard_error")}


def _cosines(materials: Materials) -> dict[str, Any]:
    """Cosine of every candidate with the selected direction, positions x layers."""
    selected = materials.direction.vector
    return {
        "positions": list(materials.extraction.positions),
        "tokens": list(materials.extraction.tokens),
        "values": [
            [_cosine(candidate, selected) for candidate in layers]
            for layers in materials.extraction.directions
        ],
    }


def _cosine(one: Tensor, other: Tensor) -> float | None:
    """None where a candidate is zero: layer 0 of a template token is the same for every prompt."""
    length = float(one.norm() * other.norm())
    return float(one @ other) / length if length > 0 else None


def _held_out(
    session: Session, prompts: dict[str, list[Prompt]] | None, materials: Materials
) -> tuple[list[dict[str, Any] | None], dict[str, list[Prompt]] | None, list[str]]:
    """By layer how held-out prompts lie apart, which these are, and why there are none."""
    candidates = materials.candidates.double()
    if prompts is None:
        return [None] * len(candidates), None, []
    try:
        found = held_out_separation(
            session, prompts, candidates, materials.direction.vector, materials.position
        )
    except InputError as error:
        return [None] * len(candidates), None, [f"nothing is tried on held-out prompts: {error}"]
    return found, prompts, []


def _geometry(materials: Materials, seed: int) -> tuple[dict[Any, Any], list[str]]:
    """By layer what :func:`measure` says; under ``projections`` the points of the plots."""
    projections: dict[str, Any] = {}
    by_layer: dict[Any, Any] = {"projections": projections}
    activations = materials.activations
    if activations is None:
        return by_layer, [
            "no activations were kept: PCA and separation are left out (run extract again with "
            "--save-activations)"
        ]
    flat = []
    for layer in activations.layers:
        pair = activations.at(layer, materials.position)
        result = measure(*pair, materials.direction.vector)
        if result is None:
            flat.append(layer)
            continue
        null = permutation_null(pair[0].numpy(), pair[1].numpy(), seed, PERMUTATIONS)
        by_layer[layer] = _geometry_record(result) | {"permutations": null}
        projections[str(layer)] = {
            "harmful": _rounded(result.harmful.tolist()),
            "harmless": _rounded(result.harmless.tolist()),
        }
    notes = [f"layer {', '.join(map(str, flat))}: the vectors are the same for every prompt"]
    return by_layer, notes if flat else []


def _geometry_record(result: Geometry) -> dict[str, Any]:
    return {
        "pc1_share": result.pc_shares[0],
        "pc2_share": result.pc_shares[1],
        "cos_pc1": result.cos_pc1,
        "auc": result.auc,
        "silhouette": result.silhouette,
        "auc_selected": result.auc_selected,
        "silhouette_selected": result.silhouette_selected,
        "n_harmful": len(result.harmful),
        "n_harmless": len(result.harmless),
    }


def _rounded(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Enough digits for a plot."""
    return [[float(f"{value:.5g}") for value in point] for point in points]


def _lens(loaded: LoadedModel, materials: Materials) -> tuple[dict[str, Any], list[str]]:
    """Tokens of the selected direction, and of each layer's candidate that is not zero."""
    chosen = [
        layer for layer, candidate in enumerate(materials.candidates) if float(candidate.norm()) > 0
    ]
    vectors = torch.stack([materials.direction.vector, *materials.candidates[chosen]])
    try:
        with engine_of(loaded).in_memory("inspect") as model:
            logits = logit_lens(model, vectors)
    except UnsupportedArchitectureError as error:
        kind = loaded.model.config.model_type
        return {"direction": None, "layers": {}}, [f"no logit lens of a '{kind}': {error}"]

    def record(row: Tensor, count: int) -> dict[str, Any]:
        promotes, suppresses = extremes(row, count)
        return {"promotes": listed(promotes), "suppresses": listed(suppresses)}

    def listed(tokens: Sequence[Promoted]) -> list[dict[str, Any]]:
        decode = loaded.tokenizer.decode
        return [{"id": t.id, "token": decode([t.id]), "logit": t.logit} for t in tokens]

    layers = {
        layer: record(row, _LAYER_TOKENS) for layer, row in zip(chosen, logits[1:], strict=True)
    }
    return {"direction": record(logits[0], _TOKENS), "layers": layers}, []
