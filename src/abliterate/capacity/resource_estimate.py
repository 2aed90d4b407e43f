"""plan: what each stage takes on a machine, from config.json and the index alone.

Nothing is loaded: the model is built on the meta device. Memory is what the stage keeps at once,
time is that of reading, copying and computing at the speeds that
:mod:`abliterate.capacity.machine_benchmark` measures here and now; none knows of other users of
the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from abliterate.checkpoints.shards import ShardSet
from abliterate.editing.shard_writer import edit_memory, usable_cores
from abliterate.errors import UsageError
from abliterate.inference.token_batches import TokenBudget
from abliterate.models.loading import DTYPES
from abliterate.models.model_classes import empty_model, text_config
from abliterate.offload.weight_passes import CPU_TOKENS
from abliterate.writers import decoder_blocks, find_writers

# What the prompts are unless options say so: the defaults of the stages, post-instruction tokens
# of common templates, and the bundled instructions in one.
TOKENS, POSITIONS, N_TRAIN, N_VAL, N_TEST, ANSWER = 32, 5, 128, 32, 100, 512
# Of the candidates, those that induce leaves over for KL and bypass; half is usual.
_PASSING = 0.5
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")


@dataclass(frozen=True)
class Machine:
    """Where the stages are to run.

    Attributes:
        memory: bytes of main memory to use.
        gpu_memory: bytes of one accelerator, 0 without one.
        disk: bytes read per second, measured.
        matmul: floating-point operations per second in layers, measured; None where the machine
            that is planned for has an accelerator and this one has not.
        copy: bytes copied per second into fresh memory, measured.
    """

    memory: int
    gpu_memory: int
    disk: float
    matmul: float | None
    copy: float


@dataclass(frozen=True)
class Shape:
    """What a model is made of, in parameters and bytes of the dtype that computes.

    Attributes:
        parameters: all of them.
        active: those that one token passes in the blocks.
        weights: bytes in memory.
        stored: bytes on disk.
        blocks: bytes of each decoder block.
        rest: bytes beside the blocks and the embeddings that are read row by row.
        projection: parameters of the vocabulary projection.
        vocabulary: its rows.
        width: d_model.
        itemsize: bytes of a number that computes.
        source: bytes on disk of what loading copies (another dtype, fused experts); they are mapped
            beside the copies until all is loaded.
        fusing: bytes at once while the largest fused tensor is made: its source, the stacked
            experts and what they are joined to.
    """

    parameters: int
    active: int
    weights: int
    stored: int
    blocks: tuple[int, ...]
    rest: int
    projection: int
    vocabulary: int
    width: int
    itemsize: int
    source: int = 0
    fusing: int = 0


@dataclass(frozen=True)
class StageEstimate:
    """One stage.

    Attributes:
        name: the command.
        mode: ``in memory``, ``offload`` or ``streamed edit``.
        passes: how often the weights are read.
        bytes_read: from disk.
        flops: floating-point operations.
        memory: peak bytes of the process (with an accelerator: of it).
        seconds: None where no speed is known.
    """

    name: str
    mode: str
    passes: int
    bytes_read: int
    flops: float
    memory: int
    seconds: float | None


@dataclass(frozen=True)
class Workload:
    """What is asked of the model.

    Attributes:
        n_train: training prompts per kind.
        n_val: validation prompts per kind.
        tokens: tokens of a prompt, chat template included.
        positions: positions whose activations are taken.
        activation_memory: bytes for activations under ``--offload``; None is half of the memory.
        libraries: bytes that the process has before the model.
    """

    n_train: int = N_TRAIN
    n_val: int = N_VAL
    tokens: int = TOKENS
    positions: int = POSITIONS
    activation_memory: int | None = None
    libraries: int = field(default=500 << 20)


def shape_of(
    config: Any,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    shards: ShardSet | None = None,
) -> Shape:
    """Sizes of a model, from its configuration.

    Args:
        config: the configuration.
        dtype: of the weights in memory.
        trust_remote_code: the checkpoint's own code may run.
        shards: its tensors, if they are there too.

    Raises:
        CheckpointError: the configuration contradicts itself, or is that of a larger model.
        UnsupportedArchitectureError: its decoder blocks cannot be found. That its writers can is
            not looked at.
    """
    model = empty_model(config, trust_remote_code, shards)
    text = text_config(model)
    blocks = _layers(model, text) or decoder_blocks(model)
    width = getattr(text, "hidden_size", None) or find_writers(model).d_model
    size = dtype.itemsize
    inside = {id(p) for block in blocks for p in block.parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {id(p) for p in embedding.parameters()}
    projected = 0 if head is None else head.weight.numel()
    everything = {id(p): p.numel() for p in model.parameters()}
    total = sum(everything.values())
    rest = sum(n for key, n in everything.items() if key not in inside | rows)
    stored = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    return Shape(
        total,
        sum(_active(block, text) for block in blocks),
        total * size,
        total * stored.itemsize,
        tuple(sum(p.numel() for p in block.parameters()) * size for block in blocks),
        min(rest * size, 64 << 20) if head is not None else rest * size,
        projected,
        embedding.weight.shape[0],
        width,
        size,
        *_copied(model, dtype, stored),
    )


def _layers(model: Any, text: Any) -> list[nn.Module]:
    """The decoder's blocks where they are plain to see; empty where it takes a trace to tell.

    A trace runs a copy with all layers and experts, which takes minutes for the largest.
    """
    parts = model.get_decoder().children()
    lists = [module for module in parts if isinstance(module, nn.ModuleList)]
    if len(lists) != 1 or len(lists[0]) != getattr(text, "num_hidden_layers", None):
        return []
    return list(lists[0])


def _copied(model: Any, dtype: torch.dtype, stored: torch.dtype) -> tuple[int, int]:
    """Bytes on disk of the parameters that are copies once loaded, and what fusing one takes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    made = [
        pattern
        for each in get_model_conversion_mapping(model)
        if isinstance(each, WeightConverter)
        for pattern in each.target_patterns
    ]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    fused = [n for name, n in sizes.items() if any(pattern in name for pattern in made)]
    copied = sum(sizes.values() if dtype != stored else fused)
    largest = max(fused, default=0)
    return copied * stored.itemsize, largest * (stored.itemsize + 2 * dtype.itemsize)


def _active(block: nn.Module, config: Any) -> int:
    """Parameters of a block that one token passes: of routed experts, those it is sent to."""
    found = [getattr(config, name, None) for name in _PER_TOKEN]
    used = next((k for k in found if isinstance(k, int) and k > 0), 0)
    total = 0
    for name, parameter in block.named_parameters():
        n = parameter.numel()
        routed = parameter.ndim == 3 and "expert" in name and used > 0
        total += n * min(used, parameter.shape[0]) // parameter.shape[0] if routed else n
    return total


def estimate(shape: Shape, machine: Machine, work: Workload) -> list[StageEstimate]:
    """What every stage takes."""
    place = machine.gpu_memory or machine.memory
    fits = shape.weights <= 0.9 * place
    return [
        _extract(shape, machine, work, fits),
        _select(shape, machine, work, fits),
        _orthogonalize(shape, machine, work),
        _verify(shape, machine, work, fits),
        _evaluate(shape, machine, work, fits),
    ]


def _flops(shape: Shape, tokens: float, prompts: float, share: float = 1.0) -> float:
    """Of ``tokens`` through a share of the blocks, and the logits of ``prompts``."""
    attention = 4 * tokens * (tokens / max(prompts, 1)) * shape.width * len(shape.blocks)
    return share * (2 * shape.active * tokens + attention) + 2 * shape.projection * prompts


def _waiting(shape: Shape, work: Workload, tokens: float, prompts: int) -> int:
    """Activations between two blocks; embeddings are held beside the stream."""
    each = int(tokens) * shape.width * shape.itemsize * 2
    kept = prompts * shape.vocabulary * shape.itemsize
    return each + kept


def _stage(
    name: str,
    shape: Shape,
    machine: Machine,
    work: Workload,
    fits: bool,
    flops: float,
    held: int,
    passes: int,
) -> StageEstimate:
    batch = TokenBudget(torch.device("cuda" if machine.gpu_memory else "cpu")).tokens
    if not fits and not machine.gpu_memory:
        batch = CPU_TOKENS
    inner = max(shape.blocks) // max(shape.itemsize * shape.width, 1)
    scratch = batch * max(inner // 4, shape.width) * shape.itemsize
    libraries = 0 if fits and machine.gpu_memory else work.libraries
    if fits:
        memory = libraries + shape.weights + scratch
        if not machine.gpu_memory:
            memory += shape.source
        mode, read = "in memory", shape.stored
        passes = 1
    else:
        budget = work.activation_memory or machine.memory // 2
        block = max(max(shape.blocks) + scratch, shape.fusing)
        memory = libraries + block + shape.rest + min(held, budget)
        mode, read = "offload", shape.stored * passes
    seconds = None
    if machine.matmul is not None:
        reading, computing = read / machine.disk, flops / machine.matmul
        # Streaming reads while it computes; loading comes first. Experts are stacked, then joined.
        seconds = reading + computing if fits else max(reading, computing)
        seconds += (2 if shape.fusing else 1) * passes * shape.source / machine.copy
    return StageEstimate(name, mode, passes, read, flops, memory, seconds)


def _extract(shape: Shape, machine: Machine, work: Workload, fits: bool) -> StageEstimate:
    prompts = 2 * work.n_train
    tokens = prompts * work.tokens
    seen = prompts * work.positions * len(shape.blocks) * shape.width * shape.itemsize
    held = _waiting(shape, work, tokens, prompts) + seen
    flops = _flops(shape, tokens, prompts)
    return _stage("extract", shape, machine, work, fits, flops, held, 1)


def _select(shape: Shape, machine: Machine, work: Workload, fits: bool) -> StageEstimate:
    layers = int(0.8 * len(shape.blocks))
    candidates = work.positions * layers
    tokens = work.n_val * work.tokens
    # A vector added at layer l runs from there on: over all layers that remain, on average this.
    share = 1 - (layers - 1) / 2 / len(shape.blocks)
    flops = _flops(shape, 2 * tokens, 2 * work.n_val)
    flops += _flops(shape, candidates * tokens, candidates * work.n_val, share)
    tested = _PASSING * candidates
    flops += _flops(shape, 2 * tested * tokens, 2 * tested * work.n_val)
    budget = work.activation_memory or machine.memory // 2
    each = tokens * shape.width * shape.itemsize * 2
    first, second = candidates * each, int(2 * tested * each)
    passes = max(1, -(-first // budget)) + max(1, -(-second // budget))
    held = max(first, second) + work.n_val * shape.vocabulary * shape.itemsize
    return _stage("select", shape, machine, work, fits, flops, held, int(passes))


def _orthogonalize(shape: Shape, machine: Machine, work: Workload) -> StageEstimate:
    memory = work.libraries + edit_memory(usable_cores())
    seconds = 2 * shape.stored / machine.disk
    return StageEstimate(
        "orthogonalize", "streamed edit", 1, shape.stored, 4.0 * shape.parameters, memory, seconds
    )


def _verify(shape: Shape, machine: Machine, work: Workload, fits: bool) -> StageEstimate:
    prompts = 32
    tokens = prompts * work.tokens
    held = _waiting(shape, work, tokens, prompts)
    flops = _flops(shape, tokens, prompts)
    return _stage("verify --forward", shape, machine, work, fits, flops, held, 1)


def _evaluate(shape: Shape, machine: Machine, work: Workload, fits: bool) -> StageEstimate:
    """Baseline, ablate and add; in memory the answers too, whose length only the run shows."""
    prompts = 3 * 2 * N_TEST
    tokens = prompts * work.tokens
    held = _waiting(shape, work, tokens, prompts)
    flops = _flops(shape, tokens, prompts)
    if fits:
        flops += _flops(shape, tokens + prompts * ANSWER, prompts * (1 + ANSWER))
    found = _stage("evaluate", shape, machine, work, fits, flops, held, 1)
    return replace(found, seconds=None) if fits else found


def dtype_of(name: str, config: Any, accelerator: bool) -> torch.dtype:
    """The dtype that computes: ``auto`` is float32 on a CPU, else the checkpoint's own.

    Raises:
        UsageError: no such dtype.
    """
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"--dtype must be auto or one of {', '.join(DTYPES)}, not '{name}'")
        return DTYPES[name]
    own = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    own = getattr(torch, own) if isinstance(own, str) else own
    return (own or torch.float32) if accelerator else torch.float32


def as_document(
    name: str, config: Any, shape: Shape, machine: Machine, work: Workload
) -> Mapping[str, Any]:
    """The plan as ``--json`` prints it."""
    stages = estimate(shape, machine, work)
    return {
        "model": name,
        "model_type": config.model_type,
        "parameters": shape.parameters,
        "active_parameters": shape.active,
        "bytes": shape.weights,
        "bytes_on_disk": shape.stored,
        "largest_block": max(shape.blocks),
        "n_layers": len(shape.blocks),
        "mode": stages[0].mode,
        "machine": asdict(machine),
        "workload": asdict(work),
        "stages": [asdict(stage) for stage in stages],
    }
