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

from abliterate.capacity.hardware import (
    COMPUTES,
    COPY,
    DISK,
    MAIN_MEMORY,
    NETWORK,
    READS,
    Hardware,
    Spread,
    spread,
    start_line,
)
from abliterate.capacity.machine_benchmark import FEW_ROWS
from abliterate.capacity.model_shape import Shape
from abliterate.editing.shard_writer import edit_memory, usable_cores
from abliterate.inference.token_batches import TokenBudget
from abliterate.offload.weight_passes import CPU_TOKENS

# What the prompts are unless options say so: the defaults of the stages, post-instruction tokens
# of common templates, and the bundled instructions in one.
TOKENS, POSITIONS, N_TRAIN, N_VAL, N_TEST, ANSWER = 32, 5, 128, 32, 100, 512
# Interventions of evaluate whose first tokens alone are looked at: four controls of each kind,
# three kinds beside ablate and two beside add.
CONTROLS = 4 * (3 + 2)
# Tokens, of so many prompts, that show once a process whether padding leaves a row as it is.
_TRIED, _TRIALS = 100, 3
# Of a device's memory for weights, of what is left for keys and values; bytes for these on a CPU.
_SHARE, _SHARE_FREE, _CACHES = 0.9, 0.7, 2 << 30
# Copies in memory that an edited byte costs, in all.
_COPIES = 5
# What gathering tokens for routed experts and small products add to these on a CPU: 1.25 to 1.4
# times as long as dense layers of as many numbers were seen on two machines.
_ROUTING = 0.3
# Of the candidates, those that induce leaves over for KL and bypass; half is usual.
_PASSING = 0.5


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
        few_rows: as ``matmul``, of a batch of :data:`FEW_ROWS` tokens, as answers are said; None
            where it is not known.
        cards: accelerators of one machine.
        nodes: machines.
        link: bytes per second between accelerators of a machine, 0 where there is one.
        assumed: the card whose maker's figures stand for measured ones; None where all is measured.
    """

    memory: int
    gpu_memory: int
    disk: float
    matmul: float | None
    copy: float
    few_rows: float | None = None
    cards: int = 1
    nodes: int = 1
    link: float = 0
    assumed: str | None = None


@dataclass(frozen=True)
class StageEstimate:
    """One stage.

    Attributes:
        name: the command.
        mode: ``in memory``, ``offload`` or ``streamed edit``; with several accelerators how the
            model is spread (:class:`abliterate.capacity.hardware.Spread`).
        passes: how often the weights are read.
        bytes_read: from disk.
        flops: floating-point operations.
        memory: peak bytes of the process (with accelerators: of each).
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
        answer: tokens of an answer, at most.
        robust: the means are robust ones, for which all activations of a kind are kept.
    """

    n_train: int = N_TRAIN
    n_val: int = N_VAL
    tokens: int = TOKENS
    positions: int = POSITIONS
    activation_memory: int | None = None
    libraries: int = field(default=500 << 20)
    answer: int = ANSWER
    robust: bool = False


def assumed_machine(hardware: Hardware, shape: Shape, memory: int | None = None) -> Machine:
    """A machine that is not at hand, for a model.

    Args:
        hardware: its cards.
        shape: the model; an answer's token reads all its weights, whatever it passes of them.
        memory: bytes of main memory, if they are known.
    """
    card = hardware.card
    read = READS * card.bandwidth / max(shape.weights, 1)  # times a second
    return Machine(
        memory or MAIN_MEMORY * hardware.cards,
        card.memory,
        DISK,
        COMPUTES * card.flops,
        COPY,
        read * FEW_ROWS * 2 * (shape.active + shape.projection),
        hardware.cards,
        hardware.nodes,
        card.link,
        card.name,
    )


def estimate(shape: Shape, machine: Machine, work: Workload) -> list[StageEstimate]:
    """What every stage takes."""
    where = spread_of(shape, machine)
    return [
        _extract(shape, machine, work, where),
        _select(shape, machine, work, where),
        _orthogonalize(shape, machine, work),
        _verify(shape, machine, work, where),
        _evaluate(shape, machine, work, where),
    ]


def spread_of(shape: Shape, machine: Machine) -> Spread:
    """How the model lies on the machine."""
    room = int(_SHARE * (machine.gpu_memory or machine.memory))
    return spread(shape.weights, room, machine.cards, machine.nodes, shape.heads)


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
    where: Spread,
    flops: float,
    held: int,
    passes: int,
    tried: int = _TRIED,
) -> StageEstimate:
    fits = where.way != "offload"
    batch = TokenBudget(torch.device("cuda" if machine.gpu_memory else "cpu")).tokens
    if not fits and not machine.gpu_memory:
        batch = CPU_TOKENS
    inner = max(shape.blocks) // max(shape.itemsize * shape.width, 1)
    scratch = batch * max(inner // 4, shape.width) * shape.itemsize
    libraries = 0 if fits and machine.gpu_memory else work.libraries
    if fits:
        memory = libraries + shape.weights // where.parts + scratch
        if not machine.gpu_memory:
            memory += shape.source
        alone = where.parts * where.copies == 1
        mode, read = "in memory" if alone else where.way, shape.stored
        passes = 1
    else:
        budget = work.activation_memory or machine.memory // 2
        block = max(max(shape.blocks) + scratch, shape.fusing)
        memory = libraries + block + shape.rest + min(held, budget)
        mode, read = "offload", shape.stored * passes
    seconds = None
    if machine.matmul is not None:
        routing = 0 if machine.gpu_memory else _ROUTING * shape.routed / max(shape.active, 1)
        reading = read / machine.disk
        computing = (1 + routing) * flops / (machine.matmul * where.speed)
        computing += _talking(shape, machine, where, flops / max(2 * shape.active, 1))
        if fits and not machine.gpu_memory:  # an accelerator takes no time for so little
            computing += _flops(shape, tried, _TRIALS) / (machine.few_rows or machine.matmul)
        if not fits and not machine.gpu_memory:  # what is read is copied by the cores that compute
            computing += read / machine.copy
        # Streaming reads while it computes; loading comes first. Experts are stacked, then joined.
        seconds = reading + computing if fits else max(reading, computing)
        seconds += (2 if shape.fusing else 1) * passes * shape.source / machine.copy
    return StageEstimate(name, mode, passes, read, flops, memory, seconds)


def _extract(shape: Shape, machine: Machine, work: Workload, where: Spread) -> StageEstimate:
    prompts = 2 * work.n_train
    tokens = prompts * work.tokens
    seen = prompts * work.positions * len(shape.blocks) * shape.width * shape.itemsize
    held = _waiting(shape, work, tokens, prompts) + seen
    flops = _flops(shape, tokens, prompts)
    found = _stage("extract", shape, machine, work, where, flops, held, 1)
    # They are in main memory, which is what a stage without an accelerator peaks in.
    kept = 0 if machine.gpu_memory else kept_activations(shape, work)
    return replace(found, memory=found.memory + kept)


def kept_activations(shape: Shape, work: Workload) -> int:
    """Bytes of main memory for the activations of one kind of prompt, where means are robust."""
    numbers = work.n_train * work.positions * len(shape.blocks) * shape.width
    return numbers * shape.itemsize if work.robust else 0


def _select(shape: Shape, machine: Machine, work: Workload, where: Spread) -> StageEstimate:
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
    return _stage("select", shape, machine, work, where, flops, held, int(passes))


def _orthogonalize(shape: Shape, machine: Machine, work: Workload) -> StageEstimate:
    memory = work.libraries + edit_memory(usable_cores())
    # Read and written; between, values are widened, projected and rounded again.
    seconds = 2 * shape.stored / machine.disk + _COPIES * shape.stored / machine.copy
    return StageEstimate(
        "orthogonalize", "streamed edit", 1, shape.stored, 4.0 * shape.parameters, memory, seconds
    )


def _verify(shape: Shape, machine: Machine, work: Workload, where: Spread) -> StageEstimate:
    prompts = 32
    tokens = prompts * work.tokens
    held = _waiting(shape, work, tokens, prompts)
    flops = _flops(shape, tokens, prompts)
    if where.way != "offload":  # one prompt after the other
        machine = replace(machine, matmul=machine.few_rows or machine.matmul)
    return _stage("verify --forward", shape, machine, work, where, flops, held, 1, tried=0)


def _evaluate(shape: Shape, machine: Machine, work: Workload, where: Spread) -> StageEstimate:
    """Baseline, ablate and add; in memory the answers too, as if each took all its tokens.

    The first tokens of the three come with their answers, in memory; those of controls do not.
    """
    prompts = 3 * 2 * N_TEST
    tokens = prompts * work.tokens
    held = _waiting(shape, work, tokens, prompts)
    controls = CONTROLS * 2 * N_TEST
    if where.way == "offload":
        controls += prompts
    flops = _flops(shape, controls * work.tokens, controls)
    found = _stage("evaluate", shape, machine, work, where, flops, held, 1)
    if where.way == "offload":
        return found
    said = prompts * work.answer
    answers = _flops(shape, tokens + said, prompts * (1 + work.answer))
    seconds = _saying(shape, machine, work, where, prompts)
    known = found.seconds is not None and seconds is not None
    total = found.seconds + seconds if known else None  # type: ignore[operator]
    return replace(found, flops=found.flops + answers, seconds=total)


def _saying(
    shape: Shape, machine: Machine, work: Workload, where: Spread, prompts: int
) -> float | None:
    """Seconds of answers: prompts are read, and each token reads the weights once a batch."""
    if machine.few_rows is None or machine.matmul is None:
        return None
    room = _CACHES if not machine.gpu_memory else int(
        _SHARE_FREE * (_SHARE * machine.gpu_memory * where.parts - shape.weights)
    )  # fmt: skip
    each = max(1, shape.cached * (work.tokens + work.answer))
    rows = max(1, min(-(-prompts // where.copies), room // each))
    batches = -(-prompts // (rows * where.copies))
    passed = 2 * (shape.active + shape.projection)
    split = where.parts if where.way == "tensor parallel" else 1
    step = max(passed * FEW_ROWS / machine.few_rows, passed * rows / machine.matmul) / split
    step += _talking(shape, machine, where, rows)
    reading = _flops(shape, prompts * work.tokens, prompts) / (machine.matmul * where.speed)
    return reading + batches * work.answer * step


def _talking(shape: Shape, machine: Machine, where: Spread, tokens: float) -> float:
    """Seconds in which ranks of one model add up what each has of a block, twice in each."""
    if where.way != "tensor parallel":
        return 0
    rate = NETWORK if where.nodes > 1 else machine.link or NETWORK
    return 2 * len(shape.blocks) * tokens * 2 * shape.width * shape.itemsize / rate


def as_document(
    name: str, config: Any, shape: Shape, machine: Machine, work: Workload
) -> Mapping[str, Any]:
    """The plan as ``--json`` prints it."""
    stages, where = estimate(shape, machine, work), spread_of(shape, machine)
    return {
        "model": name,
        "model_type": config.model_type,
        "parameters": shape.parameters,
        "active_parameters": shape.active,
        "bytes": shape.weights,
        "bytes_on_disk": shape.stored,
        "largest_block": max(shape.blocks),
        "bytes_loaded_in": dict(shape.loaded_in),
        "kept_activations": kept_activations(shape, work),
        "n_layers": len(shape.blocks),
        "mode": stages[0].mode,
        "spread": asdict(where),
        "start": start_line(where, name, machine.cards, machine.nodes),
        "machine": asdict(machine),
        "workload": asdict(work),
        "stages": [asdict(stage) for stage in stages],
    }
