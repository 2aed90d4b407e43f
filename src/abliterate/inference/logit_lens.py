"""Logit lens of a direction: what it adds to the logits when it is all that the stream holds.

``lens(v) = U(N(s v)) - U(N(0))``: ``N`` is whatever the architecture does between its last decoder
block and its output embedding (the final norm, and a projection where it has one), run by the
model's own code; ``U`` the output embedding; ``s`` scales ``v`` to a root mean square of 1, so that
the norm's epsilon does not matter. The difference to the zero stream takes the norm's and the
head's biases out, which are no part of the direction. Soft caps and logit scales come after ``U``
and are left out: they change no token's rank. Logits are given less their mean over the vocabulary,
which a softmax does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abliterate.errors import UnsupportedArchitectureError
from abliterate.writers import find_writers

# Rows of the output embedding that are widened to float32 at a time.
_CHUNK = 16384


@dataclass(frozen=True)
class Promoted:
    """A token and the logit that a direction gives it, over the vocabulary's mean."""

    id: int
    logit: float


class _Enough(Exception):
    """What the output embedding is given is known: the rest of the pass is not needed."""


def logit_lens(model: PreTrainedModel, vectors: Tensor) -> Tensor:
    """Logits of directions, float32 ``[n, vocabulary]`` on the CPU, each with mean 0.

    Args:
        model: a causal language model.
        vectors: ``[n, d_model]``, of any length but zero.

    Raises:
        UnsupportedArchitectureError: the last block's output cannot be replaced, or the model has
            no output embedding.
    """
    wide = vectors.cpu().double()
    scaled = wide / wide.square().mean(1, keepdim=True).sqrt()
    stream = torch.cat([scaled, torch.zeros_like(scaled[:1])])
    before_head = _through_final_norm(model, stream)
    read = before_head[:-1] - before_head[-1:]
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2 or weight.shape[1] != read.shape[1]:
        raise UnsupportedArchitectureError("its output embedding is no matrix [vocabulary, width]")
    parts = [read @ rows.detach().float().cpu().T for rows in weight.split(_CHUNK)]
    logits = torch.cat(parts, dim=1)
    return logits - logits.mean(1, keepdim=True)


@torch.inference_mode()
def _through_final_norm(model: PreTrainedModel, stream: Tensor) -> Tensor:
    """What the output embedding reads, float32 ``[n, width]``, if blocks leave ``[n, d_model]``."""
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedArchitectureError("it has no output embedding")
    last = model.get_submodule(find_writers(model).blocks[-1])
    caught: list[Tensor] = []

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        if not isinstance(hidden, Tensor) or hidden.shape != (len(stream), 1, stream.shape[1]):
            raise UnsupportedArchitectureError("its last block hands on no plain residual stream")
        new = stream.to(hidden.device, hidden.dtype).unsqueeze(1)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0] if args else kwargs["input"]).detach())
        raise _Enough

    handles = [
        last.register_forward_hook(replace),
        head.register_forward_pre_hook(catch, with_kwargs=True),
    ]
    device = model.get_input_embeddings().weight.device
    try:
        # One token a row: nothing that comes after the last block mixes tokens then.
        model(input_ids=torch.zeros(len(stream), 1, dtype=torch.long, device=device))
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not caught:
        raise UnsupportedArchitectureError("its output embedding is never run")
    return caught[0].reshape(len(stream), -1).float().cpu()


def extremes(logits: Tensor, count: int) -> tuple[list[Promoted], list[Promoted]]:
    """The tokens with the highest and the lowest of the logits ``[vocabulary]``, extremes first."""
    count = min(count, len(logits))

    def listed(order: Sequence[int]) -> list[Promoted]:
        return [Promoted(int(i), float(logits[i])) for i in order]

    order = torch.argsort(logits, descending=True, stable=True).tolist()
    return listed(order[:count]), listed(order[::-1][:count])
