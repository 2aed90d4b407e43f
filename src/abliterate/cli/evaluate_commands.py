"""The commands that measure answers: evaluate, and score for answers made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.cli import evaluate_options as eopt
from abliterate.cli import options as opt
from abliterate.cli.commands import chat_options, later_session, model_options, open_session
from abliterate.console import print_json, set_up
from abliterate.errors import UsageError
from abliterate.settings import load_settings

if TYPE_CHECKING:
    from abliterate.checkpoints.checkpoint import Checkpoint


def evaluate(
    model: opt.Model,
    direction: opt.DirectionFrom = None,
    intervention: eopt.Interventions = None,
    checkpoint: eopt.Checkpoints = None,
    output: eopt.EvaluationOut = None,
    harmful: opt.LaterHarmful = None,
    harmless: opt.LaterHarmless = None,
    n_test: opt.NTest = None,
    max_new_tokens: opt.MaxNewTokens = None,
    refusal_token: opt.RefusalToken = None,
    corpus: eopt.CorpusSource = None,
    corpus_texts: eopt.CorpusTexts = None,
    corpus_tokens: eopt.CorpusTokens = None,
    tasks: eopt.TaskNames = None,
    tasks_dir: eopt.TasksDir = None,
    task_limit: eopt.TaskLimit = None,
    judge: eopt.JudgeLocal = None,
    judge_url: eopt.JudgeUrl = None,
    judge_model: eopt.JudgeModel = None,
    judge_template: eopt.JudgeTemplate = None,
    judge_timeout: eopt.JudgeTimeout = None,
    judge_retries: eopt.JudgeRetries = None,
    judge_concurrency: eopt.JudgeConcurrency = None,
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
    """Complete test prompts under each intervention; count refusals, judge, check capability.

    Interrupted, the same command goes on where it stopped.
    """
    set_up(quiet, debug)
    given = {
        "model": model_options(revision, device, dtype, batch_size, trust_remote_code, seed)
        | {"device_map": device_map, "tensor_parallel": tensor_parallel}
        | {"offload": offload, "activation_memory": activation_memory},
        "chat": chat_options(system, chat_template_kwargs, response_prefix),
        "extract": {"refusal_tokens": refusal_token},
        "evaluate": {
            "harmful": harmful,
            "harmless": harmless,
            "n_test": n_test,
            "max_new_tokens": max_new_tokens,
            "corpus": corpus,
            "corpus_texts": corpus_texts,
            "corpus_tokens": corpus_tokens,
            "tasks": tasks,
            "tasks_dir": tasks_dir,
            "task_limit": task_limit,
        }
        | _judge(
            judge,
            judge_url,
            judge_model,
            judge_template,
            judge_timeout,
            judge_retries,
            judge_concurrency,
        ),
    }
    from abliterate.cli.evaluation_tables import show_evaluation
    from abliterate.direction import load_direction

    run = Path(direction) if direction and Path(direction).is_dir() else None
    vector = load_direction(direction) if direction else None
    session = (
        open_session(model, load_settings(config, given))
        if run is None
        else later_session(run, model, config, given)
    )
    names = intervention or (["baseline", "ablate", "add"] if vector else ["baseline"])
    edited = name_checkpoints(checkpoint or [])
    from abliterate.evaluation.stage import evaluate_stage

    record = evaluate_stage(session, vector, names, edited, run, output or run)
    print_json(record) if as_json else show_evaluation(record)


def name_checkpoints(specs: list[str]) -> dict[str, Checkpoint]:
    """Checkpoints by the name of their row: the one given, or that of their folder.

    Raises:
        UsageError: two have the same name, or one has that of an intervention.
        CheckpointError: one does not exist.
    """
    from abliterate.checkpoints.checkpoint import find_checkpoint
    from abliterate.evaluation.compare import INTERVENTIONS
    from abliterate.storage.artifacts import is_plain_name

    found: dict[str, Checkpoint] = {}
    for spec in specs:
        name, equals, folder = spec.partition("=")
        if not equals or "/" in name or Path(spec).exists():
            name, folder = "", spec
        name = name or Path(folder).resolve().name
        if not is_plain_name(name):
            raise UsageError(
                f"--checkpoint {spec}: '{name}' is no plain name, give one as "
                f"--checkpoint NAME={folder}"
            )
        if name in found or name in (*INTERVENTIONS, "checkpoint"):
            raise UsageError(
                f"--checkpoint {spec}: the name '{name}' is taken, give another as "
                f"--checkpoint NAME={folder}"
            )
        found[name] = find_checkpoint(folder)
    return found


def score(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSON list or JSONL of objects with prompt, response and optional category.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="JSONL file for each completion with its scores. Verdicts that it holds are kept; "
            "a file that score did not write is refused.",
            show_default=False,
        ),
    ] = None,
    judge: eopt.JudgeLocal = None,
    judge_url: eopt.JudgeUrl = None,
    judge_model: eopt.JudgeModel = None,
    judge_template: eopt.JudgeTemplate = None,
    judge_timeout: eopt.JudgeTimeout = None,
    judge_retries: eopt.JudgeRetries = None,
    judge_concurrency: eopt.JudgeConcurrency = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    batch_size: opt.BatchSize = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Score completions made elsewhere; needs no model."""
    set_up(quiet, debug)
    settings = load_settings(
        config,
        {
            "model": model_options(None, device, dtype, batch_size, trust_remote_code, None),
            "evaluate": _judge(
                judge,
                judge_url,
                judge_model,
                judge_template,
                judge_timeout,
                judge_retries,
                judge_concurrency,
            ),
        },
    )
    from abliterate.cli.evaluation_tables import show_score
    from abliterate.evaluation.score_completions import score_file

    document = score_file(file, settings, output)
    print_json(document) if as_json else show_score(document)


def _judge(
    judge: str | None,
    url: str | None,
    model: str | None,
    template: str | None,
    timeout: float | None,
    retries: int | None,
    concurrency: int | None,
) -> dict[str, Any]:
    return {
        "judge": judge,
        "judge_url": url,
        "judge_model": model,
        "judge_template": template,
        "judge_timeout": timeout,
        "judge_retries": retries,
        "judge_concurrency": concurrency,
    }
