"""What becomes of a bias on its way to the residual stream: measured on a small random copy.

A projection does not care how large a contribution is, an addition does. Between the MLP's last
matrix and the stream there may be a constant (Granite's residual multiplier, Falcon-H1's MLP
multiplier), and ``add`` means what arrives: the bias has to be that much larger.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.errors import CheckpointError, InputError, UnsupportedArchitectureError
from abliterate.inference.forward import block_input
from abliterate.writers import architecture_key, proof_of
from abliterate.writers.discovery import trace_tokens
from abliterate.writers.tiny_model import ShrinkError, randomise, shrunken

# Relative to what was added; the arithmetic is float64, but some models round to float32 inside.
_TOLERANCE = 1e-4
_AT_RUN_TIME = "use the add intervention at run time"
# An edit and its check ask for the same.
_scales: dict[tuple[Any, ...], float] = {}


def addition_scale(config: Any, layer: int, new_bias: bool) -> float:
    """The constant ``c`` with which a bias of the block's MLP arrives at the next block.

    On a copy with two sets of random weights the bias is moved by a vector ``v``; the input of
    block ``layer + 1`` has to move by ``c v`` at every token, with the same ``c`` for both, and
    nothing before it. Measured once a process.

    Args:
        config: of the plain model.
        layer: the block.
        new_bias: it is the one that the switch ``mlp_bias`` makes.

    Raises:
        CheckpointError: what arrives is no constant multiple of the bias.
        InputError: there is no next block.
        UnsupportedArchitectureError: there is no small copy to measure it on.
    """
    key = (architecture_key(config), layer, new_bias)
    if key not in _scales:
        _scales[key] = _measured_scale(config, layer, new_bias)
    return _scales[key]


def _measured_scale(config: Any, layer: int, new_bias: bool) -> float:
    proof = proof_of(config)
    names = {
        writer.parameter
        for writer in proof.plan.writers
        if (writer.layer, writer.kind, writer.bias) == (layer, "mlp", False)
    }
    kind = f"a '{config.model_type}' model"
    depth = len(proof.plan.blocks)
    if layer + 1 >= depth:
        raise InputError(
            f"layer {layer + 1} of the direction does not exist: the model has layers 0 to "
            f"{depth - 1}"
        )
    if len(names) != 1:
        raise CheckpointError(f"{kind} has no single matrix that could get the bias of --add in "
                              f"layer {layer}: {_AT_RUN_TIME}")  # fmt: skip
    bias = names.pop().removesuffix("weight") + "bias"
    if new_bias:
        config = deepcopy(config)
        config.get_text_config(decoder=True).mlp_bias = True
    scales = _measure(config, proof.plan.blocks[: layer + 2], bias)
    if None in scales:
        raise CheckpointError(
            f"{kind} does not hand on '{bias}' to the next block as it is (a norm, a gate or "
            f"another sublayer lies between): {_AT_RUN_TIME}"
        )
    first, second = (float(scale or 0.0) for scale in scales)
    if abs(first - second) > _TOLERANCE * abs(first):
        raise CheckpointError(
            f"{kind} scales '{bias}' by a learned factor, which --add does not read: {_AT_RUN_TIME}"
        )
    return float(f"{first:.7g}")  # the same on every machine


@torch.no_grad()
def _measure(config: Any, blocks: tuple[str, ...], bias: str) -> list[float | None]:
    """``c`` with two sets of weights; None where what arrives is no multiple of what was added."""
    try:
        model: Any = shrunken(config)
        parameter = model.get_parameter(bias)
    except (ShrinkError, AttributeError) as error:
        raise UnsupportedArchitectureError(
            f"a '{config.model_type}' model has no '{bias}' on which --add could be measured "
            f"({str(error)[:120]}): {_AT_RUN_TIME}"
        ) from None
    ids = trace_tokens(model)
    try:
        before = _stream(model.double(), blocks, ids)
    except RuntimeError:  # it mixes float32 of its own into the sums
        before = _stream(model.float(), blocks, ids)
    scales = []
    for seed in (0, 1):
        if seed:
            randomise(model, seed)
            before = _stream(model, blocks, ids)
        generator = torch.Generator().manual_seed(seed)
        vector = 10 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        kept = parameter.clone()
        parameter.add_(vector.to(parameter.dtype))
        after = _stream(model, blocks, ids)
        parameter.copy_(kept)
        scales.append(_scale(before, after, vector))
    return scales


def _scale(before: list[Tensor], after: list[Tensor], vector: Tensor) -> float | None:
    moved = [new - old for new, old in zip(after, before, strict=True)]
    arrived = moved.pop().reshape(-1, len(vector))
    scale = float((arrived @ vector).mean() / vector.square().sum())
    allowed = _TOLERANCE * vector.norm() * abs(scale)
    stray = max(float((arrived - scale * vector).norm(dim=1).max()), *(
        float(each.norm(dim=-1).max()) for each in moved
    ))  # fmt: skip
    return scale if scale != 0 and stray <= allowed else None


def _stream(model: Any, blocks: tuple[str, ...], ids: Tensor) -> list[Tensor]:
    """What enters each block, float64 ``[batch, tokens, d_model]``."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(name, block_input(args, kwargs).detach().double().clone())

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
        for name in blocks
    ]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[name] for name in blocks]
