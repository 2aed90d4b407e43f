"""The commands of the method: extract, select, and run, which chains all stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.cli import options as opt
from abliterate.console import print_json, set_up
from abliterate.errors import UsageError
from abliterate.settings import Settings, load_settings

if TYPE_CHECKING:
    from abliterate.run_folder import Session


def extract(
    model: opt.Model,
    output: opt.RunOut,
    harmful: opt.Harmful = None,
    harmless: opt.Harmless = None,
    n_train: opt.NTrain = None,
    filter: opt.Filter = None,
    positions: opt.Positions = None,
    refusal_token: opt.RefusalToken = None,
    save_activations: opt.SaveActivations = None,
    activation_positions: opt.ActivationPositions = None,
    system: opt.System = None,
    chat_template_kwargs: opt.TemplateKwargs = None,
    response_prefix: opt.ResponsePrefix = None,
    revision: opt.Revision = None,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    tensor_parallel: opt.TensorParallel = None,
    dtype: opt.Dtype = None,
    batch_size: opt.BatchSize = None,
    offload: opt.Offload = None,
    activation_memory: opt.ActivationMemory = None,
    seed: opt.Seed = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Extract candidate directions: difference of means at each position and layer."""
    set_up(quiet, debug)
    settings = load_settings(
        config,
        {
            "model": model_options(revision, device, dtype, batch_size, trust_remote_code, seed)
            | {"device_map": device_map, "tensor_parallel": tensor_parallel}
            | _streaming(offload, activation_memory),
            "chat": chat_options(system, chat_template_kwargs, response_prefix),
            "extract": _train(harmful, harmless, n_train, filter, positions, refusal_token)
            | _kept(save_activations, activation_positions),
        },
    )
    from abliterate.cli.tables import show_extraction

    session = open_session(model, settings)
    from abliterate.pipeline.stages import extract_stage

    record = extract_stage(session, output)
    print_json(record) if as_json else show_extraction(record, output)


def select(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder of extract.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Checkpoint, if it has moved since extract.", show_default=False
        ),
    ] = None,
    harmful: opt.LaterHarmful = None,
    harmless: opt.LaterHarmless = None,
    n_val: opt.NVal = None,
    filter: opt.Filter = None,
    kl_threshold: opt.KlThreshold = None,
    induce_threshold: opt.InduceThreshold = None,
    prune_layers: opt.PruneLayers = None,
    search: opt.SearchKind = None,
    all_layers: opt.AllLayers = None,
    kl_on: opt.KlOn = None,
    system: opt.System = None,
    chat_template_kwargs: opt.TemplateKwargs = None,
    response_prefix: opt.ResponsePrefix = None,
    revision: opt.Revision = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores", help="Choose again from a saved table; needs no model.", show_default=False
        ),
    ] = None,
    n_layers: Annotated[
        int | None,
        typer.Option(
            "--n-layers", help="Layers of the model, if the table does not say.", show_default=False
        ),
    ] = None,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    tensor_parallel: opt.TensorParallel = None,
    dtype: opt.Dtype = None,
    batch_size: opt.BatchSize = None,
    offload: opt.Offload = None,
    activation_memory: opt.ActivationMemory = None,
    seed: opt.Seed = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Score every candidate by bypass, induce and KL, and choose the direction."""
    set_up(quiet, debug)
    given: dict[str, Any] = {
        "model": model_options(revision, device, dtype, batch_size, trust_remote_code, seed)
        | {"device_map": device_map, "tensor_parallel": tensor_parallel}
        | _streaming(offload, activation_memory),
        "chat": chat_options(system, chat_template_kwargs, response_prefix),
        "select": {
            "harmful": harmful,
            "harmless": harmless,
            "n_val": n_val,
            "filter": filter,
            "kl_threshold": kl_threshold,
            "induce_threshold": induce_threshold,
            "prune_layers": prune_layers,
            "search": search,
            "all_layers": all_layers,
            "kl_on": kl_on,
        },
    }
    if (run is None) == (scores is None):
        raise UsageError("give either the run folder of extract or --scores FILE")
    if scores is not None:
        from abliterate.cli.tables import choose_again, show_choice

        choice = choose_again(scores, n_layers, load_settings(config, given))
        return print_json(choice) if as_json else show_choice(choice)
    assert run is not None
    from abliterate.cli.tables import show_selection

    session = later_session(run, model, config, given)
    from abliterate.pipeline.stages import select_stage

    record = select_stage(session, run)
    return print_json(record) if as_json else show_selection(record, run)


def run(
    model: opt.Model,
    output: opt.RunOut,
    harmful: opt.Harmful = None,
    harmless: opt.Harmless = None,
    n_train: opt.NTrain = None,
    n_val: opt.NVal = None,
    n_test: opt.NTest = None,
    filter: opt.Filter = None,
    positions: opt.Positions = None,
    refusal_token: opt.RefusalToken = None,
    save_activations: opt.SaveActivations = None,
    activation_positions: opt.ActivationPositions = None,
    kl_threshold: opt.KlThreshold = None,
    induce_threshold: opt.InduceThreshold = None,
    prune_layers: opt.PruneLayers = None,
    search: opt.SearchKind = None,
    all_layers: opt.AllLayers = None,
    kl_on: opt.KlOn = None,
    max_new_tokens: opt.MaxNewTokens = None,
    system: opt.System = None,
    chat_template_kwargs: opt.TemplateKwargs = None,
    response_prefix: opt.ResponsePrefix = None,
    revision: opt.Revision = None,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    tensor_parallel: opt.TensorParallel = None,
    dtype: opt.Dtype = None,
    batch_size: opt.BatchSize = None,
    offload: opt.Offload = None,
    activation_memory: opt.ActivationMemory = None,
    seed: opt.Seed = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """extract, select, orthogonalize and evaluate; finished stages are skipped."""
    set_up(quiet, debug)
    settings = load_settings(
        config,
        {
            "model": model_options(revision, device, dtype, batch_size, trust_remote_code, seed)
            | {"device_map": device_map, "tensor_parallel": tensor_parallel}
            | _streaming(offload, activation_memory),
            "chat": chat_options(system, chat_template_kwargs, response_prefix),
            "extract": _train(harmful, harmless, n_train, filter, positions, refusal_token)
            | _kept(save_activations, activation_positions),
            "select": {
                "n_val": n_val,
                "filter": filter,
                "kl_threshold": kl_threshold,
                "induce_threshold": induce_threshold,
                "prune_layers": prune_layers,
                "search": search,
                "all_layers": all_layers,
                "kl_on": kl_on,
            },
            "evaluate": {"n_test": n_test, "max_new_tokens": max_new_tokens},
        },
    )
    from abliterate.cli.tables import show_run

    session = open_session(model, settings)
    from abliterate.pipeline.run import run_pipeline

    record = run_pipeline(session, output)
    print_json(record) if as_json else show_run(record, output)


def open_session(model: str, settings: Settings, leave_shards: bool = False) -> Session:
    """A session on a checkpoint; imports no torch, so that a wrong name is told at once."""
    from abliterate.checkpoints.checkpoint import find_checkpoint
    from abliterate.run_folder import Session

    return Session(find_checkpoint(model, settings.model.revision, leave_shards), settings)


def later_session(run: Path, model: str | None, config: Path | None, given: Any) -> Session:
    """A session on what ``extract`` recorded in ``run``; file and options win over it."""
    from abliterate.run_records import check_trust, read_extract, take_base

    extracted = read_extract(run)
    base = take_base(run, extracted, model, load_settings(config, given))
    settings = load_settings(config, given, base)
    check_trust(run, extracted, settings)
    return open_session(model or extracted["model"]["id"], settings)


def model_options(
    revision: str | None,
    device: str | None,
    dtype: str | None,
    batch_size: str | None,
    trust_remote_code: bool | None,
    seed: int | None,
) -> dict[str, Any]:
    return {
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "batch_size": batch_size,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
    }


def _streaming(offload: bool | None, activation_memory: str | None) -> dict[str, Any]:
    return {"offload": offload, "activation_memory": activation_memory}


def _train(
    harmful: str | None,
    harmless: str | None,
    n_train: int | None,
    filter: bool | None,
    positions: str | None,
    refusal_tokens: list[str] | None,
) -> dict[str, Any]:
    return {
        "harmful": harmful,
        "harmless": harmless,
        "n_train": n_train,
        "filter": filter,
        "positions": positions,
        "refusal_tokens": refusal_tokens,
    }


def _kept(layers: str | None, positions: str | None) -> dict[str, Any]:
    return {"save_activations": layers, "activation_positions": positions}


def chat_options(system: str | None, kwargs: str | None, prefix: str | None) -> dict[str, Any]:
    return {"system": system, "template_kwargs": kwargs, "response_prefix": prefix}
