"""How well directions tell prompts apart that they were not found on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abliterate.inference.engine import BatchActivations
from abliterate.inference.in_memory import engine_of
from abliterate.inference.thoughts import ask
from abliterate.metrics.label_permutations import separation
from abliterate.prompts.sources import Prompt
from abliterate.run_folder import Session, prompt_keys

KINDS = ("harmful", "harmless")


def held_out_separation(
    session: Session,
    prompts: dict[str, list[Prompt]],
    candidates: Tensor,
    selected: Tensor,
    position: int,
) -> list[dict[str, Any] | None]:
    """AUC and silhouette of held-out prompts along each layer's candidate, and the selected one.

    Args:
        session: the model.
        prompts: by kind, at least two of each.
        candidates: float64 ``[n_layers, d_model]``, found on other prompts.
        selected: float64 ``[d_model]``.
        position: of the activations, from the prompt's end.

    Returns:
        For each layer what records hold; None where it has no candidate.

    Raises:
        InputError: no thought about them ends.
    """
    loaded, batch_size = session.load_in_memory(), session.settings.model.batch_size
    ids = {
        kind: ask(loaded, [p.text for p in chosen], session.chat, batch_size, kind).finished(kind)
        for kind, chosen in prompts.items()
    }
    reader = engine_of(loaded).resid_pre(ids, [position], batch_size)
    along: dict[str, Tensor] = {}
    for kind in KINDS:
        found = torch.zeros(2, len(ids[kind]), len(candidates), dtype=torch.float64)

        def use(batch: BatchActivations, found: Tensor = found) -> None:
            stream = batch.activations[:, 0].cpu().double()  # prompts, layers, d_model
            found[0, list(batch.rows)] = torch.einsum("nld,ld->nl", stream, candidates)
            found[1, list(batch.rows)] = stream @ selected.double()

        reader.read(kind, range(len(ids[kind])), use, f"inspect: held-out {kind}")
        along[kind] = found
    lengths = candidates.norm(dim=1)
    return [
        _record([along[kind][:, :, layer] for kind in KINDS])
        if float(lengths[layer]) > 1e-9 * float(lengths.max())
        else None
        for layer in range(len(candidates))
    ]


def _record(along: Sequence[Tensor]) -> dict[str, Any] | None:
    """Of ``[2, n]`` for each kind: along the own candidate and the selected direction."""
    harmful, harmless = along
    n_harmful, n_harmless = harmful.shape[1], harmless.shape[1]
    if min(n_harmful, n_harmless) < 2:
        return None
    values = torch.cat([harmful, harmless], dim=1).numpy()
    is_harmful = np.repeat(np.arange(n_harmful + n_harmless)[None] < n_harmful, 2, axis=0)
    found = separation(values, is_harmful)
    return {
        "n_harmful": n_harmful,
        "n_harmless": n_harmless,
        "auc": float(found.auc[0]),
        "silhouette": float(found.silhouette[0]),
        "auc_selected": float(found.auc[1]),
        "silhouette_selected": float(found.silhouette[1]),
    }


def held_out_record(prompts: dict[str, list[Prompt]] | None) -> dict[str, Any] | None:
    """Which prompts were held out, by their keys."""
    return None if prompts is None else {"split": "test", "prompts": prompt_keys(prompts)}
