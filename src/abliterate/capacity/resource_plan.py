"""plan: what the stages would take on this machine, or on one that is described."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil
import torch

from abliterate.capacity import machine_benchmark, model_shape, resource_estimate
from abliterate.capacity.hardware import Hardware
from abliterate.inference.token_batches import attempt
from abliterate.models.loading import Checkpoint, known_shards, load_config, pick_device
from abliterate.offload import free_memory


def plan_resources(
    checkpoint: Checkpoint,
    *,
    memory: int | None = None,
    gpu_memory: int | None = None,
    n_train: int = resource_estimate.N_TRAIN,
    n_val: int = resource_estimate.N_VAL,
    tokens: int = 32,
    positions: int = 5,
    answer_tokens: int = resource_estimate.ANSWER,
    hardware: Hardware | None = None,
    activation_memory: int | None = None,
    dtype: str = "auto",
    robust: bool = False,
    trust_remote_code: bool = False,
) -> Mapping[str, Any]:
    """Memory, time and passes of each stage, from configuration and headers alone.

    Args:
        checkpoint: the model; only its headers need to be here.
        memory: bytes of main memory; None for what is free.
        gpu_memory: bytes of one accelerator, 0 for none; None for what is there.
        n_train: training prompts per kind.
        n_val: validation prompts per kind.
        tokens: tokens of a prompt, chat template included.
        positions: positions that are looked at.
        answer_tokens: tokens of an answer, at most.
        hardware: a machine that is not at hand, instead of this one.
        activation_memory: bytes for a streamed model's activations; None for half of the memory.
        dtype: of the computation.
        robust: extract takes robust means, for which it keeps all activations of a kind.
        trust_remote_code: the checkpoint's own code may run.

    Returns:
        The plan as ``plan --json`` prints it.

    Raises:
        CheckpointError: the checkpoint is damaged.
        UsageError: there is no such dtype.
    """
    config = load_config(checkpoint, trust_remote_code)
    here = pick_device("auto")
    main = free_memory(torch.device("cpu")) if memory is None else memory
    gpu = gpu_memory
    if gpu is None:
        gpu = free_memory(here) if here.type not in ("cpu", "mps") else 0
    number = model_shape.dtype_of(dtype, config, gpu > 0 or hardware is not None)
    shards = known_shards(checkpoint)
    shape = model_shape.shape_of(config, number, trust_remote_code, shards)
    if hardware is not None:
        machine = resource_estimate.assumed_machine(hardware, shape, memory)
    else:
        many, few = None, None
        if not gpu or here.type != "cpu":
            place = here if gpu else torch.device("cpu")
            found: list[float] = []

            def measure() -> None:
                speed = machine_benchmark.layer_speed
                found.append(speed(shape.width, number, place))
                found.append(speed(shape.width, number, place, machine_benchmark.FEW_ROWS))

            if attempt(measure):
                many, few = found
        machine = resource_estimate.Machine(
            main,
            gpu,
            machine_benchmark.disk_speed(checkpoint.folder),
            many,
            machine_benchmark.copy_speed(),
            few,
        )
    work = resource_estimate.Workload(
        n_train,
        n_val,
        tokens,
        positions,
        activation_memory,
        psutil.Process().memory_info().rss,
        answer_tokens,
        robust,
    )
    return resource_estimate.as_document(checkpoint.name, config, shape, machine, work)
