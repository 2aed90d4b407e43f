"""What each attention head writes along a direction, and where it looks.

The output of an attention layer is ``W_O x + b``, and ``x`` holds the heads side by side, so with
unit direction ``r`` head ``i`` writes ``c_i . r = x_i . (W_O[:, i]^T r)``; the heads and the bias
sum to the whole layer's ``c . r``. Behind a post-norm (Gemma 2 and later) ``r`` becomes the
writer's own direction ``g * r``, and the norm's scale, read off the norm itself, divides all heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abliterate.inference.forward import input_device
from abliterate.models.model_classes import text_config
from abliterate.models.quantized_loading import is_quantized
from abliterate.writers import Writer, find_writers

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# How far the post-norm may be from one scale times its gain: float16's rounding, with room.
_NORM_ERROR = 2e-2


class HeadsUnknown(Exception):
    """Heads cannot be told apart; the message says why."""


@dataclass(frozen=True)
class OutProjection:
    """The out-projection of one attention layer.

    Attributes:
        layer: decoder block index.
        module: its name.
        attention: the name of the module it belongs to, which knows the attention weights.
        reader: ``[n_heads, head_dim]`` float32, ``W_O^T r`` (through the post-norm's gain).
        bias: what its bias writes along the direction.
        norm: the name of the post-norm between it and the stream, or None.
        gain: of that norm, float32 ``[d_model]``, or None.
    """

    layer: int
    module: str
    attention: str
    reader: Tensor
    bias: float
    norm: str | None = None
    gain: Tensor | None = None


def out_projections(model: PreTrainedModel, unit: Tensor) -> list[OutProjection]:
    """The attention out-projections of ``model``, in the order of its blocks.

    Args:
        model: the model.
        unit: the unit direction, float64 ``[d_model]``, or that of each layer.

    Raises:
        HeadsUnknown: there is none, or one is not a plain matrix over heads side by side.
    """
    config = text_config(model)
    n_heads = next((n for key in _HEADS if isinstance(n := getattr(config, key, None), int)), None)
    if n_heads is None:
        raise HeadsUnknown("the configuration does not say how many attention heads there are")
    kinds = getattr(config, "layer_types", None) or []
    matrices: dict[int, list[Writer]] = defaultdict(list)
    biases: dict[str, Writer] = {}
    for writer in find_writers(model).writers:
        if writer.kind != "attention" or writer.layer is None:
            continue
        if writer.layer < len(kinds) and kinds[writer.layer] not in _ATTENTION:
            continue  # linear attention and the like: their heads are others, and have no weights
        if writer.bias:
            biases[writer.parameter.rpartition(".")[0]] = writer
        else:
            matrices[writer.layer].append(writer)
    if not matrices:
        raise HeadsUnknown("no attention layer writes to the residual stream by a matrix")
    return [
        _out_projection(model, layer, writers, biases, n_heads, _at(unit, layer))
        for layer, writers in sorted(matrices.items())
    ]


def _at(unit: Tensor, layer: int) -> Tensor:
    """The direction of a layer."""
    return unit if unit.ndim == 1 else unit[layer]


def _out_projection(
    model: PreTrainedModel,
    layer: int,
    writers: Sequence[Writer],
    biases: Mapping[str, Writer],
    n_heads: int,
    unit: Tensor,
) -> OutProjection:
    writer = writers[0]
    module = writer.parameter.rpartition(".")[0]
    if len(writers) > 1 or not writer.parameter.endswith(".weight") or writer.part is not None:
        raise HeadsUnknown(f"layer {layer} writes by more than one plain matrix")
    weight = _matrix(model, writer)
    width = weight.shape[1 - writer.axis]
    if width % n_heads:
        raise HeadsUnknown(
            f"the input of {module} is {width} wide, which {n_heads} heads do not divide"
        )
    norm, gain = _post_norm(model, writer)
    seen = unit if gain is None else unit * gain
    reader = torch.tensordot(seen, weight, dims=([0], [writer.axis]))
    bias = biases.get(module)
    along = 0.0
    if bias is not None:
        along = float(seen @ model.get_parameter(bias.parameter).detach().cpu().double())
    return OutProjection(
        layer,
        module,
        module.rpartition(".")[0],
        reader.reshape(n_heads, -1).float(),
        along,
        norm,
        None if gain is None else gain.float(),
    )


@torch.inference_mode()
def _matrix(model: PreTrainedModel, writer: Writer) -> Tensor:
    """A writer's matrix, float64 on the host.

    One that is quantised is packed in ways of its own: what it does to each channel shows it.

    Raises:
        HeadsUnknown: it is no matrix.
    """
    module = model.get_submodule(writer.parameter.rpartition(".")[0])
    weight = getattr(module, "weight", None)
    if not is_quantized(model) or (
        isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize >= 2
    ):
        plain: Tensor = model.get_parameter(writer.parameter).detach()
        if plain.ndim != 2:
            raise HeadsUnknown(f"{writer.parameter} is no plain matrix")
        return plain.cpu().double()
    channels = getattr(module, "in_features", None)
    if not isinstance(channels, int):
        raise HeadsUnknown(f"{writer.parameter} is quantised, and not as a matrix")
    units = torch.eye(channels, device=input_device(model), dtype=model.dtype)
    nothing = module(torch.zeros_like(units[:1]))
    columns: Tensor = (module(units) - nothing).cpu().double()
    return columns.T if writer.axis == 0 else columns


def _post_norm(model: PreTrainedModel, writer: Writer) -> tuple[str | None, Tensor | None]:
    if not writer.gains:
        return None, None
    gain = writer.gains[0]
    if len(writer.gains) > 1 or gain.centred or gain.parameter is None or gain.index:
        raise HeadsUnknown(f"{writer.parameter} is followed by more than one per-channel gain")
    value = model.get_parameter(gain.parameter).detach().cpu().double() + gain.offset
    return gain.parameter.rpartition(".")[0], value


@dataclass(frozen=True)
class HeadView:
    """What the last tokens of one batch show.

    Attributes:
        contributions: float32 ``[batch, n_layers, n_heads]``, ``c_head . r``.
        whole: ``[batch, n_layers]``, heads and bias together, measured at the layer's output.
        attention: ``[n_layers]`` of ``[batch, n_heads, keys]``, the last token's weights, or None
            where the layer does not hand them out.
        error: the largest difference of heads plus bias to the whole, relative to its largest
            value: rounding, if the heads are what they should be.
    """

    contributions: Tensor
    whole: Tensor
    attention: list[Tensor | None]
    error: float


@contextmanager
def watch_heads(
    model: PreTrainedModel, projections: Sequence[OutProjection], unit: Tensor
) -> Iterator[Callable[[], HeadView]]:
    """Record what each head writes at the last token, during the forward passes inside.

    Args:
        model: the model; run it with eager attention to see the weights.
        projections: of :func:`out_projections`.
        unit: the unit direction, ``[d_model]``, or that of each layer.

    Yields:
        A function that returns the last pass's :class:`HeadView`. It raises ``HeadsUnknown`` where
        a post-norm is not one scale per token.
    """
    read: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}
    normed: dict[int, tuple[Tensor, Tensor]] = {}
    looked: dict[int, Tensor] = {}

    def on_projection(at: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            read[at], made[at] = _last(args[0]), _last(output)

        return hook

    def on_norm(at: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            normed[at] = _last(args[0]), _last(output)

        return hook

    def on_attention(at: int) -> Any:
        n_heads = len(projections[at].reader)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            looked.pop(at, None)
            for item in output if isinstance(output, tuple | list) else ():
                if isinstance(item, Tensor) and item.ndim == 4 and item.shape[1] == n_heads:
                    looked[at] = item[:, :, -1].detach().to(torch.float32, copy=True)

        return hook

    def result() -> HeadView:
        shares, whole = [], []
        for at, projection in enumerate(projections):
            heads = projection.reader
            apart = read[at].cpu().reshape(len(read[at]), *heads.shape)
            along = (apart * heads).sum(-1)
            before_norm = (normed[at][0].cpu(), normed[at][1].cpu()) if at in normed else None
            along_layer = _at(unit, projection.layer)
            scale, out = _through_norm(projection, made[at].cpu(), before_norm, along_layer)
            shares.append((along * scale.unsqueeze(1), projection.bias * scale))
            whole.append(out)
        contributions = torch.stack([part for part, _ in shares], dim=1)
        biases = torch.stack([bias.expand(len(contributions)) for _, bias in shares], dim=1)
        total = torch.stack(whole, dim=1)
        gap = (contributions.sum(2) + biases - total).abs().max()
        attention = [looked[at].cpu() if at in looked else None for at in range(len(projections))]
        return HeadView(contributions, total, attention, float(gap / total.abs().max()))

    with ExitStack() as stack:
        for at, projection in enumerate(projections):
            for name, hook in (
                (projection.module, on_projection(at)),
                (projection.attention, on_attention(at)),
                (projection.norm, on_norm(at)),
            ):
                if name is not None:
                    handle = model.get_submodule(name).register_forward_hook(hook)
                    stack.callback(handle.remove)
        yield result


def _last(hidden: Tensor) -> Tensor:
    """The last token's vectors, float32 ``[batch, width]``; a copy, where the model computes.

    A hook that took them to the host would wait for the device at every layer.
    """
    last = hidden.detach().reshape(hidden.shape[0], -1, hidden.shape[-1])[:, -1]
    return last.to(torch.float32, copy=True)


def _through_norm(
    projection: OutProjection, made: Tensor, normed: tuple[Tensor, Tensor] | None, unit: Tensor
) -> tuple[Tensor, Tensor]:
    """The post-norm's scale for each row (1 without one), and the layer's ``c . r``."""
    wide = unit.float()
    if projection.gain is None:
        return torch.ones(len(made)), made @ wide
    if normed is None or not torch.allclose(normed[0], made, rtol=1e-3, atol=1e-5):
        raise HeadsUnknown(f"{projection.norm} does not follow {projection.module} directly")
    plain, out = made * projection.gain, normed[1]
    scale = (plain * out).sum(1) / plain.square().sum(1).clamp_min(1e-30)
    error = (out - plain * scale.unsqueeze(1)).norm() / out.norm().clamp_min(1e-30)
    if float(error) > _NORM_ERROR:
        raise HeadsUnknown(f"{projection.norm} is not one scale per token")
    return scale, out @ wide
