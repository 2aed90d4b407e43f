"""The options of evaluate and score alone: capability checks and judges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli.options import setting_option as _option

_CAPABILITY, _JUDGE = "Capability", "Judge"

Interventions = Annotated[
    list[str] | None,
    typer.Option(
        "--intervention",
        help="baseline, ablate, add, subtract or checkpoint (all of --checkpoint); repeatable. "
        "Default: all but subtract that --direction and --checkpoint allow.",
        show_default=False,
    ),
]
Checkpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint",
        help="An edited checkpoint to compare, [NAME=]DIR or hub id; repeatable.",
        show_default=False,
    ),
]
EvaluationOut = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="Folder for evaluation.json and completions. Default: the run folder of --direction.",
        show_default=False,
    ),
]
CorpusSource = Annotated[
    list[str] | None,
    _option(
        "evaluate.corpus",
        ("--corpus",),
        "Measure loss and perplexity on pile, alpaca, own (baseline completions), pile=FILE or "
        "alpaca=FILE (or a hub id); repeatable.",
        _CAPABILITY,
    ),
]
CorpusTexts = Annotated[
    int | None,
    _option("evaluate.corpus_texts", ("--corpus-texts",), "Texts per corpus.", _CAPABILITY),
]
CorpusTokens = Annotated[
    int | None,
    _option(
        "evaluate.corpus_tokens", ("--corpus-tokens",), "Longest text, in tokens.", _CAPABILITY
    ),
]
TaskNames = Annotated[
    str | None,
    _option(
        "evaluate.tasks",
        ("--tasks",),
        "lm-eval tasks with commas: mmlu,arc_challenge,gsm8k.",
        _CAPABILITY,
    ),
]
TasksDir = Annotated[
    str | None,
    _option(
        "evaluate.tasks_dir", ("--tasks-dir",), "Folder of further task definitions.", _CAPABILITY
    ),
]
TaskLimit = Annotated[
    int | None,
    _option("evaluate.task_limit", ("--task-limit",), "Examples per task.", _CAPABILITY),
]
JudgeLocal = Annotated[
    str | None,
    _option("evaluate.judge", ("--judge",), "A Llama Guard checkpoint: folder or hub id.", _JUDGE),
]
JudgeUrl = Annotated[
    str | None,
    _option(
        "evaluate.judge_url",
        ("--judge-url",),
        "An OpenAI-compatible endpoint, such as http://localhost:8000/v1; key in OPENAI_API_KEY.",
        _JUDGE,
    ),
]
JudgeModel = Annotated[
    str | None,
    _option("evaluate.judge_model", ("--judge-model",), "Its name at the endpoint.", _JUDGE),
]
JudgeTemplate = Annotated[
    str | None,
    _option(
        "evaluate.judge_template",
        ("--judge-template",),
        "llama-guard: send the conversation. prompt: ask any model for safe or unsafe.",
        _JUDGE,
    ),
]
JudgeTimeout = Annotated[
    float | None,
    _option(
        "evaluate.judge_timeout",
        ("--judge-timeout",),
        "Seconds for one attempt as a whole: connection, question and the reply's last byte.",
        _JUDGE,
    ),
]
JudgeRetries = Annotated[
    int | None,
    _option("evaluate.judge_retries", ("--judge-retries",), "Further attempts.", _JUDGE),
]
JudgeConcurrency = Annotated[
    int | None,
    _option("evaluate.judge_concurrency", ("--judge-concurrency",), "Requests at once.", _JUDGE),
]
