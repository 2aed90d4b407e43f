"""Settings of evaluations: prompts, answers, what counts as a refusal, judges and servers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
)

from abliterate.settings.marks import Granted, Listed, Needs, Option
from abliterate.settings.section import (
    CAPABILITY,
    EVALUATE,
    JUDGE,
    LATER_HARMFUL,
    LATER_HARMLESS,
    METHOD,
    PROMPTS,
    REFUSAL,
    SCORE,
    SCORED,
    SERVER,
    Section,
)
from abliterate.settings.values import (
    as_sources,
    plain_sources,
    public_server,
    public_url,
)

# Attributes have the whole address; what is dumped into records has no secret.
_Endpoint = Annotated[str, PlainSerializer(public_url)]
_ServerSpec = Annotated[str, PlainSerializer(public_server)]


class EvaluateSettings(Section):
    """Test prompts, decoding, judge and capability checks.

    No prompts: the sources of ``extract``, and all that they hold. Several sources of a kind are
    pooled, and ``evaluate`` gives figures of each as well.
    """

    harmful: Annotated[
        tuple[str, ...],
        BeforeValidator(as_sources),
        PlainSerializer(plain_sources),
        Listed("what extract used"),
        Option(f"{LATER_HARMFUL} Repeatable.", PROMPTS, ("evaluate", "fragility")),
    ] = ()
    harmless: Annotated[
        tuple[str, ...],
        BeforeValidator(as_sources),
        PlainSerializer(plain_sources),
        Listed("what extract used"),
        Option(f"{LATER_HARMLESS} Repeatable.", PROMPTS, ("evaluate", "fragility")),
    ] = ()
    n_test: Annotated[
        int | None,
        Option("Test prompts per kind. Default: all.", PROMPTS, ("evaluate", "run")),
        Option("Test prompts per kind. Default: 32.", None, ("fragility",)),
    ] = Field(None, ge=1)
    borderline: Annotated[
        str | None,
        Option(
            "Harmless prompts that look harmful, whose refusals are counted as well: borderline "
            "(bundled), xstest, orbench-hard, or any source.",
            PROMPTS,
            ("evaluate", "run"),
        ),
    ] = None
    controls: Annotated[
        int,
        Option(
            "Directions of each kind that the selected one is compared with: random ones with the "
            "covariance of the activations, isotropic ones, those of other layers. 0: none.",
            METHOD,
            ("evaluate", "run", "fragility"),
        ),
    ] = Field(4, ge=0, le=1000)
    max_new_tokens: Annotated[
        int,
        Option("Longest answer.", METHOD, ("evaluate", "run", "chat")),
        Option("Longest answer, in tokens. Default: 64.", None, ("fragility",)),
    ] = Field(512, ge=1)
    stop_at_verdict: Annotated[
        bool,
        Option(
            "End an answer once it holds a refusal phrase: the verdict by phrases is the same, and "
            "comes sooner.",
            METHOD,
            ("evaluate", "run"),
        ),
    ] = False
    server: Annotated[
        tuple[_ServerSpec, ...],
        Granted("SERVER"),
        Option(
            "Have the baseline answered by an OpenAI-compatible server, such as "
            "http://localhost:8000/v1 (key in OPENAI_API_KEY), or with ROW=URL the row of "
            "--checkpoint ROW=DIR; repeatable. Hooks run here all the same.",
            SERVER,
            EVALUATE,
        ),
    ] = ()
    served_model: Annotated[
        tuple[str, ...],
        Needs(("server",)),
        Option(
            "The model's name at the server: NAME of the baseline, ROW=NAME of another row; "
            "repeatable.",
            SERVER,
            EVALUATE,
        ),
    ] = ()
    server_api: Annotated[
        Literal["completions", "chat"],
        Needs(("server",)),
        Option(
            "completions: send what is rendered here, as tokens. chat: send messages, which the "
            "server's own template renders.",
            SERVER,
            EVALUATE,
        ),
    ] = "completions"
    concurrency: Annotated[
        int, Needs(("server",)), Option("Requests to a server at once.", SERVER, EVALUATE)
    ] = Field(8, ge=1)
    server_timeout: Annotated[
        float,
        Needs(("server",)),
        Option("Seconds for one attempt, up to the answer's last byte.", SERVER, EVALUATE),
    ] = Field(600.0, gt=0)
    server_retries: Annotated[
        int, Needs(("server",)), Option("Further attempts.", SERVER, EVALUATE)
    ] = Field(4, ge=0)
    corpus: Annotated[
        tuple[str, ...],
        Option(
            "Measure loss and perplexity on pile, alpaca, own (baseline completions), pile=FILE or "
            "alpaca=FILE (or a hub id); repeatable.",
            CAPABILITY,
            EVALUATE,
        ),
    ] = ()
    corpus_texts: Annotated[
        int, Needs(("corpus",)), Option("Texts per corpus.", CAPABILITY, EVALUATE)
    ] = Field(4096, ge=1)
    corpus_tokens: Annotated[
        int, Needs(("corpus",)), Option("Longest text, in tokens.", CAPABILITY, EVALUATE)
    ] = Field(256, ge=2)
    tasks: Annotated[
        str | None,
        Listed("none"),
        Option("lm-eval tasks with commas: mmlu,arc_challenge,gsm8k.", CAPABILITY, EVALUATE),
    ] = None
    tasks_dir: Annotated[
        str | None,
        Granted("TASKS_DIR"),
        Needs(("tasks",)),
        Option("Folder of further task definitions.", CAPABILITY, EVALUATE),
    ] = None
    task_limit: Annotated[
        int | None, Needs(("tasks",)), Option("Examples per task.", CAPABILITY, EVALUATE)
    ] = Field(None, ge=1)
    refusal_phrases: Annotated[
        str,
        Listed("all"),
        Option(
            "Languages whose refusal phrases count, with commas: en (the paper's list), zh, es, "
            "fr, de, ja, ru, ar, hi, pt.",
            REFUSAL,
            SCORED,
        ),
    ] = "all"
    refusal_phrase: Annotated[
        tuple[str, ...],
        Option("A further phrase that makes an answer a refusal; repeatable.", REFUSAL, SCORED),
    ] = ()
    judge: Annotated[
        str | None, Option("A Llama Guard checkpoint: folder or hub id.", JUDGE, SCORE)
    ] = None
    judge_url: Annotated[
        _Endpoint | None,
        Granted("JUDGE_URL"),
        Option(
            "An OpenAI-compatible endpoint, such as http://localhost:8000/v1; key in "
            "OPENAI_API_KEY.",
            JUDGE,
            SCORE,
        ),
    ] = None
    judge_model: Annotated[str | None, Option("Its name at the endpoint.", JUDGE, SCORE)] = None
    judge_template: Annotated[
        Literal["llama-guard", "prompt"],
        Needs(("judge_url",)),
        Option(
            "llama-guard: send the conversation. prompt: ask any model for safe or unsafe.",
            JUDGE,
            SCORE,
        ),
    ] = "llama-guard"
    second_judge: Annotated[
        str | None,
        Option(
            "A second judge of the same answers: another Llama Guard checkpoint, folder or hub id.",
            JUDGE,
            EVALUATE,
        ),
    ] = None
    second_judge_url: Annotated[
        _Endpoint | None,
        Granted("SECOND_JUDGE_URL"),
        Option(
            "The second judge's endpoint; key in SECOND_JUDGE_API_KEY, else OPENAI_API_KEY.",
            JUDGE,
            EVALUATE,
        ),
    ] = None
    second_judge_model: Annotated[
        str | None, Option("Its name at that endpoint.", JUDGE, EVALUATE)
    ] = None
    second_judge_template: Annotated[
        Literal["llama-guard", "prompt"],
        Needs(("second_judge_url",)),
        Option("As --judge-template, of the second judge.", JUDGE, EVALUATE),
    ] = "llama-guard"
    classifier: Annotated[
        str | None,
        Option(
            "A text classifier, MODEL[:LABEL]: folder or hub id[@REV], and the label (name or "
            "index) whose share of answers is counted.",
            JUDGE,
            ("evaluate", "run", "score"),
        ),
    ] = None
    classifier_input: Annotated[
        Literal["auto", "pair", "answer"],
        Needs(("classifier",)),
        Option(
            "pair: it reads prompt and answer. answer: the answer alone. auto: a pair where its "
            "tokenizer sets something between two texts.",
            JUDGE,
            ("evaluate", "run", "score"),
        ),
    ] = "auto"
    judge_timeout: Annotated[
        float,
        Needs(("judge_url", "second_judge_url")),
        Option(
            "Seconds for one attempt as a whole: connection, question and the reply's last byte.",
            JUDGE,
            SCORE,
        ),
    ] = Field(60.0, gt=0)
    judge_retries: Annotated[
        int,
        Needs(("judge_url", "second_judge_url")),
        Option("Further attempts.", JUDGE, SCORE),
    ] = Field(4, ge=0)
    judge_concurrency: Annotated[
        int,
        Needs(("judge_url", "second_judge_url")),
        Option("Requests at once.", JUDGE, SCORE),
    ] = Field(8, ge=1)
