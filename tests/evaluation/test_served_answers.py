"""Answers made by a server: ``transformers serve`` as it is, and one that answers as it is told."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import Endpoint, endpoint, nobody
from thinking_models import R1, tagged, tokenizer_with
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from warm_python import warm_python

from abliterate.direction import Direction, save_direction
from abliterate.evaluation.served_prompts import prompt_text
from abliterate.models.loading import load_model
from abliterate.prompts.chat_template import ChatFormat, encode
from abliterate.resources import demo_model_dir
from abliterate.run_folder import Session

TEXTS = {
    kind: [f"{kind} {'word ' * (index % 3)}{index}" for index in range(3)]
    for kind in ("harmful", "harmless")
}
EVERY = [text for texts in TEXTS.values() for text in texts]
SMALL = ("--refusal-token", "I", "--max-new-tokens", "7")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("prompts")
    for kind, texts in TEXTS.items():
        (folder / f"{kind}.txt").write_text("\n".join(texts) + "\n")
    return tuple(str(p) for kind in TEXTS for p in (f"--{kind}", folder / f"{kind}.txt"))


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    vector = 4 * torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    save_direction(path, Direction(vector, -1, 2), "tiny")
    return path


@pytest.fixture(scope="module")
def real_server() -> Iterator[str]:
    """``transformers serve`` on a free port: it loads the folders that requests name."""
    for module in ("fastapi", "uvicorn", "transformers.cli.serving.completion"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"transformers serve needs {module}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "from transformers.cli.transformers import main; main()"
    options = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = warm_python().begin("-c", command, *options, "--dtype", "float32").running
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.is_running(), "transformers serve has ended"
            assert time.monotonic() < deadline, "transformers serve does not start"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "completions").glob("*.jsonl"))}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_transformers_serve_answers_as_the_demo_model_does_here(
    cli: Any, fails: Any, real_server: str, tmp_path: Path
) -> None:
    base = ("evaluate", demo_model_dir(), "--n-test", "3", "--max-new-tokens", "20")
    more = ("--system", "You are helpful.", "--response-prefix", "So", "--refusal-token", "I")
    here = cli(*base, *more, "-o", tmp_path / "here", "--json")
    assert here.code == 0, here.err
    served = ("--server", real_server, "--served-model", demo_model_dir())
    there = cli(*base, *more, *served, "-o", tmp_path / "there", "--json")
    assert there.code == 0, there.err
    assert _files(tmp_path / "there") == _files(tmp_path / "here")
    assert len(_files(tmp_path / "there")) == 2
    # Answers that end by themselves and others that are cut are both among them.
    said = [
        len(line["response"])
        for path in (tmp_path / "there" / "completions").glob("*.jsonl")
        for line in _lines(path)
    ]
    assert len(set(said)) > 2
    found, own = there.json["interventions"]["baseline"], here.json["interventions"]["baseline"]
    for kind in ("harmful", "harmless"):
        assert found[kind]["refused"] == own[kind]["refused"]
        assert found[kind]["refusal_metric"] is None
    assert own["kl_divergence"] == 0
    assert found["kl_divergence"] is found["kl_divergence_ci"] is None
    assert "KL and first-token scores need logits" in there.err
    assert "another number of tokens" not in there.err
    # The same as messages, which the server renders.
    talk = (*base, *more[:2], *more[4:])
    own = cli(*talk, "-o", tmp_path / "own", "--json")
    chat = cli(*talk, *served, "--server-api", "chat", "-o", tmp_path / "chat", "--json")
    assert chat.code == 0, chat.err
    assert _files(tmp_path / "chat") == _files(tmp_path / "own")
    assert "another number of tokens" not in chat.err
    wrong = ("--server", real_server, "--served-model", "./nowhere", "--server-retries", "0")
    assert f"--server {real_server}" in fails(*base, *more, *wrong, code=4)
    wrong = ("--server", real_server.removesuffix("/v1"), "--served-model", demo_model_dir())
    assert "up to and with /v1" in fails(*base, *more, *wrong, code=4)


def test_transformers_serve_answers_the_rows_that_it_is_given(
    cli: Any, tiny: Any, real_server: str, direction: Path, prompts: Any, tmp_path: Path
) -> None:
    edited, model = tmp_path / "edited", tiny("llama")
    assert cli("orthogonalize", model, "--direction", direction, "-o", edited).code == 0
    base = (
        "evaluate", model, "--direction", direction, "--checkpoint", edited, *SMALL, *prompts,
    )  # fmt: skip
    here = cli(*base, "-o", tmp_path / "here", "--json")
    assert here.code == 0, here.err
    served = (
        "--server", real_server, "--served-model", model,
        "--server", f"edited={real_server}", "--served-model", f"edited={edited}",
    )  # fmt: skip
    there = cli(*base, *served, "-o", tmp_path / "there", "--json")
    assert there.code == 0, there.err
    assert _files(tmp_path / "there") == _files(tmp_path / "here")
    files = _files(tmp_path / "there")
    assert len({files[f"{row}-harmful.jsonl"] for row in ("baseline", "edited")}) == 2
    # Hooks run here, against the model's own logits.
    own, found = here.json["interventions"], there.json["interventions"]
    for row in ("ablate", "add"):
        assert found[row] == own[row]
    assert found["edited"]["kl_divergence"] is None
    assert there.json["servers"] == {
        "baseline": {
            "url": real_server,
            "model": str(model),
            "api": "completions",
            "temperature": 0,
        },
        "edited": {
            "url": real_server,
            "model": str(edited),
            "api": "completions",
            "temperature": 0,
        },
    }
    report = tmp_path / "report.html"
    assert cli("report", tmp_path / "there", "-o", report).code == 0
    assert "--server edited=SERVER" in report.read_text()
    table = cli(*base, *served, "-o", tmp_path / "there")
    assert f"edited: answers of {edited} at {real_server}" in " ".join(table.out.split())


def _completion(text: Any, reason: str = "stop", **more: Any) -> tuple[int, dict[str, str], str]:
    choice = {"index": 0, "text": text, "finish_reason": reason, **more.pop("choice", {})}
    document = {"id": "x", "object": "text_completion", "created": 0, "model": "m",
                "choices": [choice], **more}  # fmt: skip
    return 200, {"Content-Type": "application/json"}, json.dumps(document)


def _asked(model: Path) -> dict[tuple[int, ...], str]:
    """The user's text by the token ids that a model here is asked with."""
    ids = encode(AutoTokenizer.from_pretrained(model), EVERY, ChatFormat())
    return {tuple(row): text for row, text in zip(ids, EVERY, strict=True)}


def _answering(model: Path, say: Callable[[str], Any] = str.upper) -> Callable[[Any], Any]:
    known = _asked(model)
    return lambda body: _completion(say(known[tuple(body["prompt"])]))


def _posts(server: Endpoint) -> list[dict[str, Any]]:
    return [body for body in server.requests if "prompt" in body]


def test_prompts_are_sent_as_tokens_and_no_model_is_loaded(
    cli: Any, tiny: Any, prompts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k-123")
    monkeypatch.setattr(Session, "load", lambda *args: pytest.fail("a model is loaded"))
    model = tiny("llama")
    base = ("evaluate", model, *SMALL, *prompts, "-o", tmp_path / "out", "--served-model", "m")
    with endpoint(_answering(model)) as server:
        found = cli(*base, "--server", server.url, "--seed", "5", "--json")
        assert found.code == 0, found.err
        sent = [dict(body) for body in _posts(server)]
        assert sorted(tuple(body.pop("prompt")) for body in sent) == sorted(_asked(model))
        assert all(body == sent[0] for body in sent)
        assert sent[0] == {
            "path": "/v1/completions", "model": "m", "max_tokens": 7, "temperature": 0,
            "frequency_penalty": 0, "repetition_penalty": 1, "seed": 5, "stop_token_ids": [2],
        }  # fmt: skip
        assert set(server.keys) == {"Bearer k-123"}
        # Nothing is asked again; another name at the server is another model.
        assert cli(*base, "--server", server.url, "--seed", "5").code == 0
        assert len(_posts(server)) == 6
        assert cli(*base[:-1], "n", "--server", server.url, "--seed", "5").code == 0
        assert len(_posts(server)) == 12
    said = _lines(tmp_path / "out" / "completions" / "baseline-harmful.jsonl")
    assert [line["response"] for line in said] == [text.upper() for text in TEXTS["harmful"]]


def test_requests_are_made_at_once_and_no_more_than_told(cli: Any, tiny: Any, prompts: Any) -> None:
    """The first of three is asked alone, then two at once: each waits for the other."""
    together, known = threading.Barrier(2, timeout=60), _asked(tiny("llama"))
    met, first = [], set()

    def rule(body: dict[str, Any]) -> Any:
        text = known[tuple(body["prompt"])]
        kind = text.split()[0]
        if kind not in first:
            first.add(kind)
            return _completion("Yes")

        def write(line: Any) -> None:
            together.wait()
            met.append(text)
            payload = _completion("Yes")[2].encode()
            line.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
                + str(len(payload)).encode() + b"\r\nConnection: close\r\n\r\n" + payload
            )  # fmt: skip

        return write

    base = ("evaluate", tiny("llama"), *SMALL, *prompts, "--served-model", "m")
    with endpoint(rule) as server:
        found = cli(*base, "--server", server.url, "--concurrency", "2", "--json")
    assert found.code == 0, found.err
    assert len(met) == 4


def test_an_evaluation_goes_on_after_its_server_has_failed(
    cli: Any, fails: Any, tiny: Any, prompts: Any, tmp_path: Path
) -> None:
    model, answers = tiny("llama"), _answering(tiny("llama"))
    base = ("evaluate", model, *SMALL, *prompts, "--served-model", "m", "--concurrency", "1")
    with endpoint(answers) as server:
        whole = cli(*base, "--server", server.url, "-o", tmp_path / "whole")
        assert whole.code == 0, whole.err
        out, once = tmp_path / "out", []

        def fail_later(body: Any) -> Any:
            if len(_posts(server)) > 6 + 4:
                return 500, {}, "out of memory"
            return answers(body)

        server.rule = fail_later
        options = ("--server", server.url, "-o", out, "--server-retries", "0")
        line = fails(*base, *options, code=4)
        assert "HTTP 500" in line
        assert "goes on from there" in line
        assert not (out / "evaluation.json").exists()

        def fail_once(body: Any) -> Any:
            once.append(body)
            return (503, {}, "busy") if len(once) == 1 else answers(body)

        server.rule, before = fail_once, len(_posts(server))
        again = cli(*base, "--server", server.url, "-o", out)
        assert again.code == 0, again.err
        assert len(_posts(server)) - before == 2 + 1  # what was missing, and one more attempt
    assert _files(out) == _files(tmp_path / "whole")


def test_ctrl_c_keeps_what_is_answered(cli: Any, tiny: Any, prompts: Any, tmp_path: Path) -> None:
    answers = _answering(tiny("llama"))

    def interrupt(body: Any) -> Any:
        if len(_posts(server)) < 5:
            return answers(body)
        os.kill(os.getpid(), signal.SIGINT)
        return None

    base = ("evaluate", tiny("llama"), *SMALL, *prompts, "--served-model", "m", "-o", tmp_path)
    with endpoint(interrupt) as server:
        options = (*base, "--server", server.url, "--concurrency", "1")
        stopped = cli(*options)
        assert stopped.code == 130, stopped.err
        assert "the same command goes on" in stopped.err
        server.rule, before = answers, len(_posts(server))
        found = cli(*options)
        assert found.code == 0, found.err
        assert len(_posts(server)) - before == 2


def test_a_streamed_model_gets_its_answers_from_a_server(
    cli: Any, tiny: Any, direction: Path, prompts: Any, tmp_path: Path
) -> None:
    """Streamed from disk a model gives no answers, but its logits; a server gives the answers."""
    base = ("evaluate", tiny("llama"), "--direction", direction, *SMALL, *prompts, "--offload")
    rows = ("--intervention", "baseline", "--intervention", "ablate")
    with endpoint(_answering(tiny("llama"))) as server:
        served = ("--server", server.url, "--served-model", "m", "-o", tmp_path)
        found = cli(*base, *rows, *served, "--json")
    assert found.code == 0, found.err
    baseline, ablated = (found.json["interventions"][row] for row in ("baseline", "ablate"))
    assert (baseline["harmful"]["n"], baseline["kl_divergence"]) == (3, None)
    assert ablated["harmful"]["n"] == 0
    assert ablated["kl_divergence"] > 0
    assert set(found.json["outputs"]) == {"baseline-harmful.jsonl", "baseline-harmless.jsonl"}
    assert cli("report", tmp_path, "-o", tmp_path / "report.html").code == 0


def test_a_server_of_chats_is_sent_messages(
    cli: Any, fails: Any, tiny: Any, prompts: Any, tmp_path: Path
) -> None:
    template = AutoTokenizer.from_pretrained(tiny("llama")).chat_template
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    (model / "chat_template.jinja").write_text("{% if loud %}LOUD {% endif %}" + template)
    base = ("evaluate", model, *SMALL, *prompts, "--served-model", "m", "--server-api", "chat")
    more = ("--system", "Be kind.", "--template-arg", "loud=true", "-o", tmp_path / "out")
    with endpoint(lambda body: f"Yes, {body['messages'][-1]['content']}") as server:
        found = cli(*base, *more, "--server", server.url, "--json")
        assert found.code == 0, found.err
        for body in server.requests:
            assert body["path"] == "/v1/chat/completions"
            assert body["messages"][0] == {"role": "system", "content": "Be kind."}
            assert body["chat_template_kwargs"] == {"loud": True}
            assert (body["temperature"], body["max_tokens"]) == (0, 7)
        asked = sorted(body["messages"][1]["content"] for body in server.requests)
        assert asked == sorted(EVERY)
        said = _lines(tmp_path / "out" / "completions" / "baseline-harmful.jsonl")
        assert [line["response"] for line in said] == [f"Yes, {t}" for t in TEXTS["harmful"]]
        message = {"role": "assistant", "content": None, "reasoning_content": "I cannot?"}
        document = json.dumps({"choices": [{"message": message, "finish_reason": "length"}]})
        server.rule = lambda body: (200, {"Content-Type": "application/json"}, document)
        found = cli(*base, "--server", server.url, "--json")
        assert found.json["interventions"]["baseline"]["harmful"]["no_verdict"] == 3
        server.rule = lambda body: _completion("Yes")
        told = fails(*base, "--server", server.url, code=4)
        assert "no chat completion" in told
        url = ("--server", server.url)
        assert "--response-prefix has no effect" in fails(
            *base, *url, "--response-prefix", "I", code=2
        )
        r1 = tmp_path / "r1"
        shutil.copytree(tiny("llama"), r1)
        (r1 / "chat_template.jinja").write_text(R1)
        assert "the empty thought" in fails("evaluate", r1, *base[2:], *url, code=2)
        assert "--template has no effect" in fails(*base, *url, "--template", "plain", code=2)
    assert "--server-api has no effect without --server" in fails(*base[:-4], *base[-2:], code=2)


def test_a_server_that_gives_no_answers_is_told_in_a_line(
    fails: Any, tiny: Any, prompts: Any
) -> None:
    base = ("evaluate", tiny("llama"), *SMALL, *prompts, "--served-model", "m",
            "--server-retries", "0")  # fmt: skip
    with nobody() as url:
        assert "cannot be reached" in fails(*base, "--server", url, code=4)
    with endpoint(lambda body: (404, {}, '{"error": {"message": "no m"}}')) as server:
        told = fails(*base, "--server", server.url, code=4)
        assert "endpoint /v1/completions" in told
        server.models = ["a", "b"]
        told = fails(*base, "--server", server.url, code=4)
        assert "has no model 'm'" in told
        assert "--served-model; it serves a, b" in told
        server.rule = lambda body: (401, {}, "who are you")
        assert "set OPENAI_API_KEY" in fails(*base, "--server", server.url, code=4)
        too_long = '{"error": {"message": "max_tokens is beyond the context"}}'
        server.rule = lambda body: (400, {}, too_long)
        assert "--max-new-tokens" in fails(*base, "--server", server.url, code=4)
        unusable: list[Any] = [
            "a chat's answer",
            (200, {"Content-Type": "application/json"}, "{"),
            (200, {"Content-Type": "text/html"}, "<html>"),
            (200, {"Content-Type": "application/json"}, '{"choices": []}'),
            _completion(None),
            _completion(["Yes"]),
        ]
        for reply in unusable:
            server.rule = lambda body, reply=reply: reply
            assert "unusable answer" in fails(*base, "--server", server.url, code=4)
        server.rule = lambda body: None
        slow = ("--server", server.url, "--server-timeout", "0.5")
        assert "no answer within 0.5 s: raise --server-timeout" in fails(*base, *slow, code=4)


def test_servers_that_are_named_wrongly_are_refused(fails: Any, tiny: Any, prompts: Any) -> None:
    base = ("evaluate", tiny("llama"), *SMALL, *prompts)
    url, named = "http://127.0.0.1:9/v1", ("--served-model", "m")
    for bad in ("127.0.0.1:9", "ftp://x/v1"):
        assert "must start with http" in fails(*base, "--server", bad, *named, code=2)
    for bad in ("http://", "http://[::1", "http://x:99999"):
        assert "is no address" in fails(*base, "--server", bad, *named, code=2)
    assert "--served-model NAME" in fails(*base, "--server", url, code=2)
    assert "without --server" in fails(*base, *named, code=2)
    assert "twice" in fails(*base, "--server", url, "--server", url, *named, code=2)
    assert "twice" in fails(*base, "--server", url, *named, *named, code=2)
    assert "names no model" in fails(*base, "--server", url, "--served-model", "", code=2)
    assert "hooks run here" in fails(*base, "--server", f"ablate={url}", *named, code=2)
    assert "--checkpoint x=DIR" in fails(*base, "--server", f"x={url}", *named, code=2)
    other = ("--checkpoint", f"x={tiny('llama')}", "--server", f"x={url}")
    assert "give ROW=NAME, of x" in fails(*base, *other, *named, code=2)
    alone = (*other, "--intervention", "checkpoint", "--served-model", "x=m")
    assert "add --intervention baseline" in fails(*base, *alone, "--server", url, *named, code=2)
    assert "--corpus is measured from logits" in fails(
        *base, "--server", url, *named, "--corpus", "own", code=2
    )


def test_what_an_address_holds_in_secret_is_recorded_nowhere(
    cli: Any, fails: Any, tiny: Any, prompts: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    base = ("evaluate", tiny("llama"), *SMALL, *prompts, "-o", out, "--served-model", "m")
    with endpoint(_answering(tiny("llama"), lambda text: f"{text} of hunter22 t0ken99")) as server:
        url = server.url.replace("//", "//user:hunter22@") + "?key=t0ken99"
        found = cli(*base, "--server", url, "--json")
        assert found.code == 0, found.err
        assert {body["path"] for body in server.requests} == {"/v1/completions?key=t0ken99"}
        assert all(key is not None and key.startswith("Basic ") for key in server.keys)
        assert found.json["settings"]["evaluate"]["server"] == [server.url]
        config = tmp_path / "config.toml"
        config.write_text(f'[evaluate]\nserver = ["{url}"]\n')
        assert cli(*base, "--config", config).code == 0
        server.rule = lambda body: (403, {}, "not hunter22 t0ken99")
        other = (*base[:-1], "n", "--server", url)
        told = fails(*other, code=4)
    written = [p.read_text() for p in out.rglob("*") if p.is_file()]
    for secret in ("hunter22", "t0ken99"):
        assert secret not in "".join((*written, found.out, found.err, told))
    config.write_text(f'[evaluate]\nserver = "{url}"\n')
    assert "hunter22" not in fails(*base, "--config", config, code=2)


def test_answers_that_the_server_cuts_short_or_misreads_are_told(
    cli: Any, tiny: Any, prompts: Any
) -> None:
    base = ("evaluate", tiny("llama"), *SMALL, *prompts, "--served-model", "m")
    used = {"prompt_tokens": 99, "total_tokens": 106}
    with endpoint(
        lambda body: _completion("I", "length", usage=used | {"completion_tokens": 3})
    ) as server:
        found = cli(*base, "--server", server.url)
        assert found.code == 0, found.err
        assert found.err.count("3 answers were cut by a bound of the server's own") == 2
        # At --max-new-tokens every answer ends, here as well.
        server.rule = lambda body: _completion("I", "length", usage=used | {"completion_tokens": 7})
        again = cli(*base, "--server", server.url).err
        assert "were cut" not in again
        # It says how many tokens it has read, which are not those of the prompts.
        assert again.count("3 prompts as another number of tokens") == 2


def test_thoughts_of_served_answers_are_told_apart(
    cli: Any, tiny: Any, prompts: Any, tmp_path: Path
) -> None:
    template = tmp_path / "r1.jinja"
    template.write_text(R1)
    base = (
        "evaluate",
        tiny("llama"),
        *SMALL,
        *prompts,
        "--served-model",
        "m",
        "--thinking",
        "whole",
    )
    own = (*base, "--template", template, "-o", tmp_path / "out")
    said = {
        "I cannot say no\n</think>\n\nSure": ("I cannot say no", "Sure"),
        "I cannot say no": ("I cannot say no", None),
    }
    for text, (thought, answer) in said.items():
        with endpoint(lambda body, text=text: _completion(text)) as server:
            found = cli(*own, "--server", server.url, "--json")
        assert found.code == 0, found.err
        line = _lines(tmp_path / "out" / "completions" / "baseline-harmful.jsonl")[0]
        assert (line["thought"], line["answer"]) == (thought, answer)
        assert found.json["interventions"]["baseline"]["harmful"]["refused"] == 0
    # A server that tells them apart itself.
    for answer, cut, verdict in (("Sure", "stop", False), ("", "length", None)):
        choice = {"reasoning_content": "I cannot?"}
        reply = _completion(answer, cut, choice=choice, usage={"prompt_tokens": 1,
                            "completion_tokens": 7, "total_tokens": 8})  # fmt: skip
        with endpoint(lambda body, reply=reply: reply) as server:
            found = cli(*base, "-o", tmp_path / "apart", "--server", server.url, "--json")
        assert found.code == 0, found.err
        for line in _lines(tmp_path / "apart" / "completions" / "baseline-harmful.jsonl"):
            assert (line["thought"], line["answer"]) == ("I cannot?", answer or None)
            assert line["refused"] is verdict


def test_special_tokens_that_part_thoughts_from_answers_are_asked_for(
    cli: Any, tiny: Any, prompts: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    model, marks = tmp_path / "model", ("[THINK]", "[/THINK]")
    shutil.copytree(tiny("llama"), model)
    tokenizer_with(tokenizer_dir, tagged(*marks), marks).save_pretrained(model)
    base = ("evaluate", model, *SMALL, *prompts, "--served-model", "m", "--thinking", "whole")
    with endpoint(lambda body: _completion("I cannot[/THINK]Sure.<|end|>")) as server:
        found = cli(*base, "-o", tmp_path / "out", "--server", server.url, "--json")
        assert found.code == 0, found.err
        assert all(body["skip_special_tokens"] is False for body in _posts(server))
        assert found.json["interventions"]["baseline"]["harmful"]["refused"] == 0
        for line in _lines(tmp_path / "out" / "completions" / "baseline-harmful.jsonl"):
            assert (line["thought"], line["answer"]) == ("I cannot", "Sure.")

        def refuse(body: Any) -> Any:
            if "skip_special_tokens" in body:
                return 400, {}, json.dumps({"error": {"message": "no skip_special_tokens here"}})
            return _completion("I cannotSure.")

        server.rule = refuse
        found = cli(*base, "--server", server.url, "--json")
    assert found.code == 0, found.err
    assert "leaves special tokens out" in found.err
    assert found.json["interventions"]["baseline"]["harmful"]["no_verdict"] == 3


def test_a_server_is_not_asked_for_what_it_does_not_take(
    cli: Any, tiny: Any, prompts: Any, tmp_path: Path
) -> None:
    """One that takes texts alone and few fields, and names those that it refuses, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    known = _asked(tiny("llama"))
    taken: list[dict[str, Any]] = []

    def rule(body: dict[str, Any]) -> Any:
        for name in ("repetition_penalty", "stop_token_ids"):
            if name in body:
                return 422, {}, json.dumps({"detail": f"Unexpected fields: {{'{name}'}}"})
        if not isinstance(body["prompt"], str):
            return 400, {}, json.dumps({"detail": "prompt must be a string."})
        taken.append(body)
        return _completion(known[tuple(tokenizer(body["prompt"])["input_ids"])].upper())

    base = ("evaluate", tiny("llama"), *SMALL, *prompts, "--served-model", "m", "-o", tmp_path)
    with endpoint(rule) as server:
        found = cli(*base, "--server", server.url)
    assert found.code == 0, found.err
    assert len(taken) == 6
    assert all(body["stop"] == ["<|end|>"] and body["frequency_penalty"] == 0 for body in taken)
    said = _lines(tmp_path / "completions" / "baseline-harmless.jsonl")
    assert [line["response"] for line in said] == [text.upper() for text in TEXTS["harmless"]]
    assert found.err.count("does not take repetition_penalty") == 1
    # What the first replies have told holds for the others.
    assert len(_posts(server)) == 6 + 3


def test_a_text_prompt_gives_the_server_the_same_tokens(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = encode(tokenizer, ["Hello there"], ChatFormat())[0]
    text = prompt_text(tokenizer, ids)
    assert text == tokenizer.decode(ids)
    # A tokenizer that puts a beginning of text before any text, as the template has done already.
    tokenizer.bos_token = "<|pad|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", bos)]
    )
    assert prompt_text(tokenizer, [bos, *ids]) == text
    assert prompt_text(tokenizer, ids) is None


def test_served_answers_are_those_of_a_model_here_after_its_thought(
    cli: Any, tiny: Any, prompts: Any, tmp_path: Path
) -> None:
    """``--thinking skip``: the same bounds of thought and answer, counted in tokens."""
    loaded = load_model(str(tiny("llama")))
    long = "word " * 12
    base = ("evaluate", tiny("llama"), *SMALL, *prompts, "--served-model", "m", "-o", tmp_path)
    skip = ("--thinking", "skip", "--max-thinking-tokens", "20")
    count = len(loaded.tokenizer(f"<think>{long}</think>")["input_ids"])
    for room, answer in ((count + 9, True), (count - 9, False)):
        with endpoint(
            lambda body: _completion(f"<think>{long}</think>" + "I cannot. " * 9)
        ) as server:
            found = cli(*base, *skip[:-1], str(room), "--server", server.url, "--json")
        assert found.code == 0, found.err
        for line in _lines(tmp_path / "completions" / "baseline-harmful.jsonl"):
            assert (line["answer"] is not None) is answer
            said = loaded.tokenizer(line["answer"] or "", add_special_tokens=False)["input_ids"]
            assert len(said) <= 7
