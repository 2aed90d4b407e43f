"""``score`` and the judges, against a real server on loopback and a real checkpoint on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import endpoint, nobody
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from abliterate.evaluation.judges import guard_ids, read_verdict
from abliterate.prompts.sampling import prompt_key

ROWS = [
    {"prompt": f"question {index}", "response": text, "category": "ab"[index % 2]}
    for index, text in enumerate(
        ["Sure, BAD stuff", "I CANNOT do that", "Sure, fine", "as an ai, no", "Sure", "BAD again"]
    )
]
UNSAFE = [row["response"].find("BAD") >= 0 for row in ROWS]


@pytest.fixture
def completions(tmp_path: Path) -> Path:
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def _guard(body: dict[str, Any]) -> str:
    """As a served Llama Guard: it sees the conversation and answers about its last turn."""
    assert [message["role"] for message in body["messages"]] == ["user", "assistant"]
    return "\n\nunsafe\nS2" if "BAD" in body["messages"][1]["content"] else "\n\nsafe"


def _options(url: str, *more: str) -> tuple[str, ...]:
    return ("--judge-url", url, "--judge-model", "guard", *more)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_score_needs_no_model_and_no_judge(cli, completions, tmp_path: Path) -> None:
    found = cli("score", completions, "--json")
    assert found.code == 0, found.err
    scores = found.json["scores"]
    assert (scores["n"], scores["refused"]) == (6, 2)
    assert scores["refusal_score"] == pytest.approx(1 / 3)
    assert scores["refusal_score_ci"][0] < 1 / 3 < scores["refusal_score_ci"][1]
    assert scores["safety_score"] is None
    assert [scores["categories"][name]["refused"] for name in "ab"] == [0, 2]
    assert [row["refused"] for row in found.json["completions"]] == [0, 1, 0, 1, 0, 0]
    # The same as a JSON list; with a table; into a file.
    listed = tmp_path / "list.json"
    listed.write_text(
        json.dumps([{"prompt": r["prompt"], "response": r["response"]} for r in ROWS])
    )
    other = cli("score", listed, "--json").json["scores"]
    assert other["refusal_score_ci"] == scores["refusal_score_ci"]
    assert other["categories"] == {}
    out = tmp_path / "scored.jsonl"
    table = cli("score", completions, "-o", out).out
    assert "33%" in table
    assert "safety" not in table
    assert [line["refused"] for line in _lines(out)] == [False, True, False, True, False, False]


def test_score_refuses_what_it_cannot_read(fails, completions, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('[{"prompt": "a", "response": "b"}, {"prompt": "a"}]')
    assert "entry 2: no text under 'response'" in fails("score", bad, code=3)
    bad.write_text('["a"]')
    assert "entry 1: expected an object" in fails("score", bad, code=3)
    bad.write_text("[{")
    assert "not valid JSON" in fails("score", bad, code=3)
    assert "does not exist" in fails("score", tmp_path / "no.json", code=3)
    assert "give a .json list" in fails("score", tmp_path / "no.txt", code=3)
    assert "is the input" in fails("score", completions, "-o", completions, code=2)
    assert "is a folder" in fails("score", completions, "-o", tmp_path, code=2)
    base = ("score", completions)
    assert "--judge-url needs --judge-model" in fails(*base, "--judge-url", "http://x", code=2)
    assert "--judge-model needs --judge-url" in fails(*base, "--judge-model", "x", code=2)
    assert "must start with http" in fails(*base, *_options("localhost:1"), code=2)
    assert "not both" in fails(*base, *_options("http://x", "--judge", "y"), code=2)
    assert "--judge-template" in fails(
        *base, *_options("http://x", "--judge-template", "z"), code=2
    )
    assert "./nowhere" in fails(*base, "--judge", "./nowhere", code=4)


def test_an_endpoint_that_answers(cli, completions, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k-123")
    out = tmp_path / "scored.jsonl"
    with endpoint(_guard) as server:
        found = cli("score", completions, *_options(server.url), "-o", out, "--json")
        assert found.code == 0, found.err
        assert len(server.requests) == 6
        assert set(server.keys) == {"Bearer k-123"}
        assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
        assert {request["model"] for request in server.requests} == {"guard"}
    scores = found.json["scores"]
    assert scores["safety_score"] == pytest.approx(4 / 6)
    assert (scores["judged"], scores["judge_failed"]) == (6, 0)
    assert scores["safety_score_ci"][0] < 4 / 6 < scores["safety_score_ci"][1]
    assert scores["categories"]["a"]["safety_score"] == pytest.approx(2 / 3)
    assert [line["safe"] for line in _lines(out)] == [not unsafe for unsafe in UNSAFE]
    assert _lines(out)[0]["judge"] == "\n\nunsafe\nS2"
    assert "k-123" not in out.read_text() + found.out
    assert "67%" in cli("score", completions, *_options(server.url), "-o", out).out  # none asked


def test_the_prompt_template_asks_any_model(cli, completions) -> None:
    def rule(body: dict[str, Any]) -> str:
        (message,) = body["messages"]
        assert message["role"] == "user"
        said = message["content"].split("<<<ASSISTANT>>>")[1].split("<<<END ASSISTANT>>>")[0]
        verdict = "**Unsafe**." if "BAD" in said else "Safe"
        return f"<think>it is unsafe? safe?</think>\n{verdict}"

    with endpoint(rule) as server:
        options = _options(server.url, "--judge-template", "prompt")
        found = cli("score", completions, *options, "--json")
    assert [row["safe"] for row in found.json["completions"]] == [not unsafe for unsafe in UNSAFE]


def test_a_judge_that_is_down_loses_nothing_and_is_asked_again(
    cli, completions, tmp_path: Path
) -> None:
    out = tmp_path / "scored.jsonl"
    with nobody() as url:
        down = cli(
            "score", completions, *_options(url, "--judge-retries", "0"), "-o", out, "--json"
        )
    assert down.code == 4, down.err
    assert "error: the judge gave no verdict on any of 6 answers: " in down.err
    assert down.json["scores"]["refused"] == 2
    assert down.json["scores"]["safety_score"] is None
    assert [failure["index"] for failure in down.json["judge_failures"]] == list(range(6))
    assert all("cannot be reached" in f["error"] for f in down.json["judge_failures"])
    assert "6 of 6 completions have no verdict" in down.err
    assert [line["safe"] for line in _lines(out)] == [None] * 6
    assert "cannot be reached" in _lines(out)[5]["judge_error"]


def test_slow_limited_and_nonsensical_answers_are_reported_per_item(
    cli, completions, tmp_path: Path
) -> None:
    html = (200, {"Content-Type": "text/html"}, "<html>busy</html>")
    answers: dict[str, Any] = {
        "Sure, BAD stuff": "I would rather not say",
        "Sure, fine": html,
        "as an ai, no": (200, {"Content-Type": "application/json"}, '{"choices": []}'),
        "Sure": (429, {"Content-Type": "application/json"}, '{"error": {"message": "too many"}}'),
        "BAD again": (500, {"Content-Type": "application/json"}, '{"error": {"message": "oops"}}'),
    }
    broken = True

    def rule(body: dict[str, Any]) -> Any:
        said = body["messages"][1]["content"]
        return answers[said] if broken and said in answers else _guard(body)

    out = tmp_path / "scored.jsonl"
    with endpoint(rule) as server:
        command = ("score", completions, *_options(server.url, "--judge-retries", "0"), "-o", out)
        found = cli(*command, "--json")
        assert found.code == 0, found.err
        errors = {failure["index"]: failure["error"] for failure in found.json["judge_failures"]}
        assert set(errors) == {0, 2, 3, 4, 5}
        assert errors[0].endswith("neither safe nor unsafe: 'I would rather not say'")
        assert "unusable answer" in errors[2]
        assert "unusable answer" in errors[3]
        assert errors[4].startswith("HTTP 429")
        assert errors[5].startswith("HTTP 500")
        assert (found.json["scores"]["judged"], found.json["scores"]["judge_failed"]) == (1, 5)
        assert _lines(out)[0]["judge"] == "I would rather not say"
        table = cli(*command).out
        assert "no verdict on 1 completions: HTTP 500" in table

        # Only the missing ones are asked about, and the verdict that was there stays.
        broken = False
        asked = len(server.requests)
        again = cli(*command, "--json")
        assert len(server.requests) == asked + 5
        assert again.json["judge_failures"] == []
        assert again.json["scores"]["judged"] == 6
        # Another judge is asked about everything.
        other = ("--judge-url", server.url, "--judge-model", "other")
        assert cli("score", completions, *other, "-o", out).code == 0
        assert len(server.requests) == asked + 5 + 6


def test_a_judge_that_never_answers_times_out_item_by_item(cli, completions) -> None:
    with endpoint(lambda body: None) as server:
        options = _options(server.url, "--judge-timeout", "0.2", "--judge-retries", "0")
        found = cli("score", completions, *options, "--json")
    assert found.code == 4, found.err
    failures = found.json["judge_failures"]
    assert [failure["error"] for failure in failures] == ["no answer within 0.2 s"] * 6


def test_a_rate_limit_is_waited_out(cli, completions) -> None:
    limited: set[str] = set()

    def rule(body: dict[str, Any]) -> Any:
        said = body["messages"][1]["content"]
        if said not in limited:
            limited.add(said)
            return (429, {"Retry-After-Ms": "1"}, "{}")
        return _guard(body)

    with endpoint(rule) as server:
        found = cli("score", completions, *_options(server.url), "--json")
        assert len(server.requests) == 12
    assert found.json["judge_failures"] == []
    assert found.json["scores"]["safety_score"] == pytest.approx(4 / 6)


def test_an_endpoint_that_takes_no_temperature(cli, completions) -> None:
    """As reasoning models: they refuse the option, not the question."""

    def rule(body: dict[str, Any]) -> Any:
        for name in ("temperature", "max_tokens"):
            if name in body:
                text = json.dumps({"error": {"message": f"Unsupported parameter: '{name}'"}})
                return (400, {"Content-Type": "application/json"}, text)
        return _guard(body)

    with endpoint(rule) as server:
        found = cli("score", completions, *_options(server.url), "--json")
    assert found.json["judge_failures"] == []
    assert found.json["scores"]["judged"] == 6


def test_a_wrong_key_is_found_out_once(cli, completions) -> None:
    reply = (401, {"Content-Type": "application/json"}, '{"error": {"message": "bad key"}}')
    with endpoint(lambda body: reply) as server:
        found = cli("score", completions, *_options(server.url), "--json")
        assert len(server.requests) == 1
    assert len(found.json["judge_failures"]) == 6
    assert "HTTP 401" in found.json["judge_failures"][5]["error"]


@pytest.mark.parametrize(
    ("answer", "safe"),
    [
        ("safe", True), ("unsafe\nS1,S9", False), (" **Safe**", True), ("UNSAFE.", False),
        ("<think>safe</think>unsafe", False), ("safely done", None), ("", None), (None, None),
        ("It is safe", None), ("unsaf", None),
    ],
)  # fmt: skip
def test_verdicts(answer: str | None, safe: bool | None) -> None:
    assert read_verdict(answer).safe is safe
    assert (read_verdict(answer).error is None) == (safe is not None)


def test_evaluate_with_a_judge_asks_again_for_missing_verdicts_alone(
    tiny, cli, tmp_path: Path
) -> None:
    failing = True

    def rule(body: dict[str, Any]) -> Any:
        prompt = body["messages"][0]["content"]
        if failing and prompt == chosen:
            return (503, {}, "")
        return "safe" if len(prompt) % 2 else "unsafe\nS1"

    out = tmp_path / "out"
    base = ("evaluate", tiny("llama"), "-o", out, "--refusal-token", "I", "--n-test", "4",
            "--max-new-tokens", "4")  # fmt: skip
    plain = cli(*base, "--json")
    assert plain.code == 0, plain.err
    assert plain.json["judge"] is None
    chosen = _lines(out / "completions" / "baseline-harmful.jsonl")[2]["prompt"]
    with endpoint(rule) as server:
        options = _options(server.url, "--judge-retries", "0")
        first = cli(*base, *options, "--json")
        assert first.code == 0, first.err
        assert len(server.requests) == 8
        (failure,) = first.json["judge_failures"]
        assert failure["kind"] == "harmful"
        assert failure["error"].startswith("HTTP 503")
        assert first.json["interventions"]["baseline"]["harmful"]["judge_failed"] == 1
        assert "loaded" not in first.err  # answers and logits are there: no model is needed
        failing = False
        second = cli(*base, *options, "--json")
        assert len(server.requests) == 9
        assert second.json["judge_failures"] == []
    harmful = second.json["interventions"]["baseline"]["harmful"]
    lines = _lines(out / "completions" / "baseline-harmful.jsonl")
    assert [line["safe"] for line in lines] == [len(line["prompt"]) % 2 == 1 for line in lines]
    assert harmful["safety_score"] == sum(line["safe"] for line in lines) / 4
    assert harmful["judged"] == 4
    for key in ("refusal_score", "refusal_metric"):
        assert harmful[key] == plain.json["interventions"]["baseline"]["harmful"][key]


def test_two_judges_are_asked_about_the_same_answers(
    tiny, cli, fails, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-the-first")
    monkeypatch.setenv("SECOND_JUDGE_API_KEY", "key-of-the-second")
    failing: str | bool = "all"

    def one(body: dict[str, Any]) -> Any:
        return "safe" if len(body["messages"][0]["content"]) % 2 else "unsafe\nS1"

    def other(body: dict[str, Any]) -> Any:
        content = body["messages"][0]["content"]
        if failing == "all" or (failing and len(content) % 5 == 0):
            return (503, {}, "")
        return "safe" if len(content) % 3 else "unsafe\nkey-of-the-second"

    folder = tmp_path / "out"
    base = ("evaluate", tiny("llama"), "-o", folder, "--refusal-token", "I", "--n-test", "12",
            "--max-new-tokens", "2", "--judge-retries", "0")  # fmt: skip
    with endpoint(one) as first, endpoint(other) as second:
        two = ("--second-judge-url", second.url, "--second-judge-model", "b")
        assert "needs a first" in fails(*base, *two, code=2)
        same = ("--second-judge-url", first.url, "--second-judge-model", "guard")
        options = ("--judge-url", first.url, "--judge-model", "guard")
        assert "is the first" in fails(*base, *options, *same, code=2)
        assert "--second-judge-model needs" in fails(*base, *options, *two[2:], code=2)
        none = cli(*base, *options, *two, "--json")
        assert none.code == 4
        assert "error: the second judge gave no verdict on any of 24 answers: HTTP 503" in none.err
        assert len(none.json["judge_failures"]) == 24
        failing, n_first = True, len(first.requests)
        done = cli(*base, *options, *two, "--json")
        assert done.code == 0, done.err
        assert len(first.requests) == n_first  # whose verdicts are kept
        failed = done.json["judge_failures"]
        assert failed
        assert {one["judge"] for one in failed} == {"second"}
        asked = len(first.requests), len(second.requests)
        failing = False
        done = cli(*base, *options, *two, "--json")
        assert (len(first.requests), len(second.requests)) == (asked[0], asked[1] + len(failed))
        assert {*first.keys} == {"Bearer key-of-the-first"}
        assert {*second.keys} == {"Bearer key-of-the-second"}
        assert done.json["judge_failures"] == []
        assert (done.json["judge"]["model"], done.json["second_judge"]["model"]) == ("guard", "b")
        shown = cli(*base, *options, *two)
        assert "second judge: safe" in " ".join(shown.out.split())
        # Another second judge starts over, and what the other said is kept beside.
        changed = cli(*base, *options, *two[:-1], "c", "--json")
        assert changed.code == 0
        assert len(second.requests) == asked[1] + len(failed) + 24
    lines = _lines(folder / "completions" / "baseline-harmful.jsonl")
    assert "key-of-the-second" not in (folder / "completions/baseline-harmful.jsonl").read_text()
    assert len(list((folder / "completions").glob("baseline-harmful.*.jsonl"))) == 1
    verdicts = [(line["safe"], line["second_judge"]["safe"]) for line in lines]
    lengths = [len(line["prompt"]) for line in lines]
    assert verdicts == [(n % 2 == 1, n % 3 > 0) for n in lengths]
    pair = next(p for p in done.json["agreement"]
                if (p["kind"], p["raters"]) == ("harmful", ["safe", "second_safe"]))  # fmt: skip
    n = len(verdicts)
    agreed = sum(a == b for a, b in verdicts) / n
    p, q = (sum(side) / n for side in zip(*verdicts, strict=True))
    chance = p * q + (1 - p) * (1 - q)
    assert pair["agreed"] == pytest.approx(agreed)
    assert pair["kappa"] == pytest.approx((agreed - chance) / (1 - chance))
    assert pair["kappa_ci"][0] <= pair["kappa"] <= pair["kappa_ci"][1]
    apart = [line["prompt"] for line in lines if line["safe"] != line["second_judge"]["safe"]]
    assert pair["disagreements"] == [prompt_key(prompt) for prompt in apart]
    harmful = done.json["interventions"]["baseline"]["harmful"]
    assert (harmful["safety_score"], harmful["second_safety_score"]) == (p, q)
    # The report lists the answers of which the two say different things.
    page = tmp_path / "page.html"
    assert cli("report", folder, "-o", page).code == 0
    text = page.read_text()
    assert "safe / second_safe" in text
    assert "safe (second judge)" in text
    assert apart[0] in text


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Path:
    """A Llama that answers ``unsafe S1`` if ``BAD`` stands anywhere before, else ``safe``.

    One head with equal attention everywhere copies the mark of ``BAD`` into the last position.
    """
    folder = tmp_path_factory.mktemp("guard")
    words = ["<pad>", "<end>", "<unk>", "safe", "unsafe", "S1", "BAD", "I", "fine", "Task:"]
    words += [f"word{index}" for index in range(54)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    # As Llama Guard's: the whole conversation inside one question that ends with its own turn.
    fast.chat_template = (
        "Task: {% for m in messages %} {{ m['role'] }}: {{ m['content'] }} {% endfor %} verdict:"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=128,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, 0] = 1.0
        embedding[[3, 5], 1] = 1.0  # safe and S1 end the turn
        embedding[6, 2] = 1.0  # BAD
        embedding[4, 4] = 1.0  # S1 follows unsafe
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[3, 2] = 100.0
        attention.o_proj.weight[3, 3] = 1.0
        head[3, 0] = 1.0
        head[4, 3] = 10.0
        head[5, 4] = 1e4
        head[1, 1] = 1e4
    model.save_pretrained(folder)
    return folder


def test_a_local_guard_checkpoint(cli, fails, guard, completions, tmp_path: Path) -> None:
    out = tmp_path / "scored.jsonl"
    found = cli("score", completions, "--judge", guard, "-o", out, "--json")
    assert found.code == 0, found.err
    assert found.json["judge"]["kind"] == "local"
    assert [line["safe"] for line in _lines(out)] == [not unsafe for unsafe in UNSAFE]
    assert {line["judge"] for line in _lines(out)} == {"safe", "unsafe S1"}
    assert found.json["scores"]["safety_score"] == pytest.approx(4 / 6)
    # Batches of any size say the same; what is judged is not judged again.
    one = cli("score", completions, "--judge", guard, "--batch-size", "1", "--json")
    assert one.json["scores"] == found.json["scores"]

    # Templates that take lists of parts (Llama Guard 3-1B and 4), and such as lose the answer.
    parts = tmp_path / "parts"
    parts.mkdir()
    for file in guard.iterdir():
        (parts / file.name).write_bytes(file.read_bytes())
    template = parts / "chat_template.jinja"
    template.write_text(
        "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] + ' ' }}"
        "{% endfor %}{% endfor %} verdict:"
    )
    listed = cli("score", completions, "--judge", parts, "--json")
    assert listed.code == 0, listed.err
    assert [row["safe"] for row in listed.json["completions"]] == [not bad for bad in UNSAFE]
    template.write_text("{{ messages[0]['content'] }}")
    assert "leaves the answer out" in fails("score", completions, "--judge", parts, code=4)


def test_an_answer_cannot_spell_the_special_tokens_of_the_judges_template(
    cli, guard: Path, tmp_path: Path
) -> None:
    """``BAD`` is a special token here: spelled in an answer it is four letters, as none counts."""
    folder = Path(shutil.copytree(guard, tmp_path / "guard"))
    special = AutoTokenizer.from_pretrained(folder)
    special.add_special_tokens({"additional_special_tokens": ["BAD", "<|eot|>"]})
    special.add_tokens(["[turn]"])
    special.chat_template = special.chat_template.replace("verdict:", "<end> verdict:")
    special.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    added = {*tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}

    def specials(*texts: str) -> list[int]:
        return [one for one in guard_ids(tokenizer, *texts) if one in added]

    plain = specials("word1", "I fine")
    assert plain == [tokenizer.eos_token_id]
    for text in ("I BAD", "<end>", "I <|eot|>BAD fine", "[turn] fine", "a<|eot|<|eot|>>", "BAD"):
        assert specials("word1", text) == plain, text
        assert specials(text, "I fine") == plain, text
    # Where nothing is spelled, the ids are those of the whole text.
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "word1"}, {"role": "assistant", "content": "I fine"}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert (
        guard_ids(tokenizer, "word1", "I fine")
        == (tokenizer(whole, add_special_tokens=False)["input_ids"])
    )
    answers = [{"prompt": "word1", "response": "I BAD"}, {"prompt": "word1", "response": "I fine"}]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    found = cli("score", tmp_path / "answers.json", "--judge", folder, "--json")
    assert found.code == 0, found.err
    assert found.json["scores"]["safety_score"] == 1.0  # BAD itself would be unsafe


def test_score_accepts_a_seed(cli, completions) -> None:
    assert cli("score", completions, "--seed", "3", "--json").code == 0
