"""Finding every parameter that writes to the residual stream, and proving that none is missing.

Uses ``models`` for small copies to trace and ``checkpoints`` for what a configuration says.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from abliterate.checkpoints.quantized_formats import plain_config
from abliterate.errors import PlanError, UnsupportedArchitectureError
from abliterate.writers.discovery import DiscoveryError, discover
from abliterate.writers.parameter_names import module_name
from abliterate.writers.plan import Gain, HookPoint, Obstacle, Writer, WriterPlan, block_of
from abliterate.writers.proof import Proof, prove, prove_in_place
from abliterate.writers.tiny_model import ShrinkError

__all__ = [
    "Gain",
    "HookPoint",
    "Obstacle",
    "Proof",
    "Writer",
    "WriterPlan",
    "architecture_key",
    "block_of",
    "decoder_blocks",
    "find_writers",
    "is_post_norm",
    "proof_of",
    "prove_in_place",
    "stream_width",
]

_proofs: dict[tuple[type, str], Proof | str] = {}  # or why there is none
# What the small copy does not take over: a checkpoint in another dtype has the same proof.
_SHAPELESS = frozenset(("_name_or_path", "dtype", "torch_dtype", "transformers_version"))
_plans: WeakKeyDictionary[PreTrainedModel, WriterPlan] = WeakKeyDictionary()


def proof_of(config: Any) -> Proof:
    """The plan for an architecture and its proof on a shrunken random copy, made once a process.

    Args:
        config: a model's configuration; of a vision-language model the text decoder counts.

    Raises:
        UnsupportedArchitectureError: no copy can be built, or it has no decoder blocks.
    """
    key = architecture_key(config)
    if key not in _proofs:
        try:
            _proofs[key] = prove(config)
        except (ShrinkError, DiscoveryError) as error:
            _proofs[key] = str(error)
    found = _proofs[key]
    if isinstance(found, str):
        raise UnsupportedArchitectureError(
            f"architecture '{config.model_type}': its writers cannot be found ({found})"
        )
    return found


def architecture_key(config: Any) -> tuple[type, str]:
    """What decides the small copy of a configuration, and so all that is measured on it."""
    return type(config), json.dumps(_shaping(config.to_dict()), sort_keys=True, default=str)


def _shaping(values: Any) -> Any:
    """The values of a configuration, and of those within it, that shape the model."""
    if not isinstance(values, dict):
        return values
    return {str(n): _shaping(v) for n, v in values.items() if n not in _SHAPELESS}


def plan_for(model: PreTrainedModel, plan: WriterPlan, sample: str) -> WriterPlan:
    """``plan``, made on a copy whose decoder is named ``sample``, with the names of ``model``.

    The text decoder of a vision-language model has its own place in it.
    """
    here = module_name(model, model.get_decoder())

    def moved(name: str) -> str:
        inside = name == sample or name.startswith(sample + ".")
        return here + name[len(sample) :] if inside else name

    def moved_gain(gain: Gain) -> Gain:
        return replace(gain, parameter=gain.parameter and moved(gain.parameter))

    return replace(
        plan,
        writers=tuple(
            replace(w, parameter=moved(w.parameter), gains=tuple(map(moved_gain, w.gains)))
            for w in plan.writers
        ),
        sites=tuple(replace(site, module=moved(site.module)) for site in plan.sites),
        blocks=tuple(map(moved, plan.blocks)),
    )


def stream_width(model: PreTrainedModel, plan: WriterPlan) -> int:
    """d_model of the residual stream, on which every writer agrees.

    Raises:
        PlanError: they do not agree.
    """
    whole = [writer for writer in plan.writers if writer.part is None]
    if getattr(model, "is_quantized", False):
        widths = {width for writer in whole if (width := _quantized_width(model, writer))}
    else:
        widths = {int(model.get_parameter(w.parameter).shape[w.axis]) for w in whole}
    if len(widths) != 1:
        raise PlanError(f"the writers found have different widths: {sorted(widths)}")
    return widths.pop()


def _quantized_width(model: PreTrainedModel, writer: Writer) -> int | None:
    """What a writer of a quantised model says of d_model; None where it is packed.

    Quantised matrices have other shapes, dtypes and names: embeddings, norms and biases stay.
    """
    module, _, name = writer.parameter.rpartition(".")
    parameter = getattr(model.get_submodule(module), name, None)
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        return None
    return int(parameter.shape[writer.axis]) if parameter.itemsize >= 2 else None


def is_post_norm(model: PreTrainedModel, plan: WriterPlan) -> bool:
    """Whether a norm stands between a writer and the stream (Gemma 2, OLMo 2).

    The edit takes a direction out of what enters the norm, whose scale then is another one; hooks
    take it out behind the norm. A gain of another kind (LayerScale) is the same in both.
    """

    def is_norm(gain: Gain) -> bool:
        if gain.parameter is None or gain.centred:
            return gain.centred
        module = model.get_submodule(gain.parameter.rpartition(".")[0])
        return "norm" in type(module).__name__.lower()

    return any(is_norm(gain) for writer in plan.writers for gain in writer.gains)


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks in order; what enters block ``l`` is ``resid_pre`` of layer ``l``.

    Raises:
        UnsupportedArchitectureError: there are none that hand on a residual stream.
    """
    return [model.get_submodule(name) for name in find_writers(model).blocks]


def find_writers(model: PreTrainedModel) -> WriterPlan:
    """Every writer of ``model`` and the sites where ``ablate`` acts, found once a model.

    Raises:
        UnsupportedArchitectureError: they cannot be found.
    """
    if model not in _plans:
        try:
            proof = proof_of(plain_config(model.config))
            _plans[model] = plan_for(model, proof.plan, proof.decoder)
        except UnsupportedArchitectureError:
            if any(parameter.is_meta for parameter in model.parameters()):
                raise  # there is nothing to look at
            # No small copy (code that came with the checkpoint, say): look at the model itself.
            try:
                _plans[model] = discover(model)
            except DiscoveryError as error:
                raise UnsupportedArchitectureError(f"{type(model).__name__}: {error}") from None
    return _plans[model]
