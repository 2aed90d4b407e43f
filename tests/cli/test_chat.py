"""The command chat: piped, typed at a terminal, side by side; the intervention switched midway."""

from __future__ import annotations

import io
import os
import pty
import select
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Commands
from safetensors.torch import save_file
from warm_python import warm_python

from abliterate.cli.app import main
from abliterate.inference.dialogue import Conversation, Decoding, Steering
from abliterate.metrics.refusal_phrases import is_refusal
from abliterate.models.loading import LoadedModel, load_model
from abliterate.prompts.sources import read_source
from abliterate.resources import demo_model_dir

SHORT = ("--max-new-tokens", "24", "--device", "cpu")


@pytest.fixture(scope="module")
def model() -> Path:
    return demo_model_dir()


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory) -> Path:
    """The demo model's direction, by the command line."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["extract", str(model), "-o", str(folder), "--n-train", "48", "-q"]) == 0
    assert main(["select", str(folder), "--n-val", "16", "-q"]) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load_model(str(model), "cpu")


def reference(loaded: LoadedModel, messages: list[dict[str, str]]) -> str:
    """What transformers itself answers to a conversation, greedily."""
    tokenizer = loaded.tokenizer
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24,
                                    do_sample=False)  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def refused(loaded: LoadedModel) -> str:
    """A bundled prompt that the demo model declines."""
    prompts = (prompt.text for prompt in read_source("harmful").splits["test"])
    return next(text for text in prompts if is_refusal(reference(loaded, [user(text)])))


@pytest.fixture(scope="module")
def answered(loaded: LoadedModel) -> str:
    """A bundled prompt that it answers."""
    prompts = (prompt.text for prompt in read_source("harmless").splits["test"])
    return next(text for text in prompts if not is_refusal(reference(loaded, [user(text)])))


@pytest.fixture
def talk(cli, model: Path, monkeypatch) -> Callable:
    """Run chat with these lines on stdin."""

    def say(*lines: str, options: tuple = ()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return cli("chat", model, *SHORT, *options)

    return say


def test_ablation_ends_refusal_and_off_brings_it_back(
    model: Path, run: Path, refused: str, loaded: LoadedModel, commands: Commands
) -> None:
    """As a pipeline would: a process, a line per turn, an answer per line."""
    lines = [refused, "/reset", "/ablate", refused, "/reset", "/off", refused]
    typed = "\n".join(lines) + "\n"
    done = commands("chat", model, "--direction", run, *SHORT, input=typed)
    assert done.code == 0, done.err
    before, ablated, after = done.out.splitlines()
    assert is_refusal(before)
    assert not is_refusal(ablated)
    assert after == before == reference(loaded, [user(refused)])


def test_switched_in_mid_conversation(talk, run: Path, refused: str) -> None:
    lines = (refused, "/ablate", refused, "/off", refused)
    result = talk(*lines, options=("--direction", run, "--json"))
    assert result.code == 0, result.err
    turns = result.json["turns"]
    assert [turn["intervention"] for turn in turns] == ["off", "ablate", "off"]
    assert [is_refusal(turn["answer"]) for turn in turns] == [True, False, True]


def test_adding_the_direction_makes_it_decline(talk, run: Path, answered: str) -> None:
    lines = (answered, "/reset", "/add 1.0", answered, "/reset", "/add -0", answered)
    result = talk(*lines, options=("--direction", run, "--json"))
    assert result.code == 0, result.err
    plain, added, nothing = result.json["turns"]
    assert not is_refusal(plain["answer"])
    assert is_refusal(added["answer"])
    assert added["intervention"] == "add 1"
    assert nothing["answer"] == plain["answer"]


def test_begun_with_an_intervention_and_compared(talk, run: Path, refused: str) -> None:
    alone = talk(refused, options=("--direction", run, "--ablate"))
    assert alone.code == 0, alone.err
    assert not is_refusal(alone.out)
    both = talk(refused, "/off", refused, options=("--direction", run, "--ablate", "--compare"))
    assert both.code == 0, both.err
    first, second, third, fourth = both.out.splitlines()
    assert first.startswith("[baseline] ")
    assert is_refusal(first)
    assert second == f"[ablate] {alone.out.strip()}"
    # Each column goes on from its own answers.
    assert third.startswith("[baseline] ")
    assert fourth.startswith("[off] ")
    as_json = talk(refused, options=("--direction", run, "--add", "-1", "--compare", "--json"))
    (turn,) = as_json.json["turns"]
    assert f"[baseline] {turn['baseline']}" == first
    assert turn["intervention"] == "add -1"


def test_turns_and_system_message_reach_the_model(talk, loaded: LoadedModel, answered: str) -> None:
    result = talk(answered, "//really", "/reset", answered, options=("--system", "Be brief."))
    assert result.code == 0, result.err
    system = {"role": "system", "content": "Be brief."}
    first = reference(loaded, [system, user(answered)])
    history = [system, user(answered), {"role": "assistant", "content": first}, user("/really")]
    assert result.out.splitlines() == [first, reference(loaded, history), first]


def test_sampling_is_seeded(talk, answered: str) -> None:
    def sampled(*options: str) -> str:
        result = talk(answered, answered, options=("--temperature", "3", *options))
        assert result.code == 0, result.err
        return result.out

    assert sampled("--seed", "1") == sampled("--seed", "1")
    assert sampled("--seed", "1") != sampled("--seed", "2")
    assert sampled("--seed", "1") != talk(answered, answered).out


def test_answers_stream_and_ctrl_c_keeps_what_was_said(loaded: LoadedModel, answered: str) -> None:
    conversation = Conversation(loaded, None, decoding=Decoding(24))
    pieces: list[str] = []
    whole = conversation.answer(answered, Steering(), pieces.append)
    assert len(pieces) > 2
    assert "".join(pieces).strip() == whole

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    conversation.turns = []
    with pytest.raises(KeyboardInterrupt):
        conversation.answer(answered, Steering(), interrupt)
    question, answer = conversation.turns
    assert question == user(answered)
    assert whole.startswith(answer["content"])
    assert conversation.answer(answered, Steering())  # no hook and no lock is left behind


def test_wrong_options_and_lines_end_with_one_line(
    talk, fails, model: Path, run: Path, tmp_path: Path, monkeypatch
) -> None:
    base = ("chat", model, *SHORT)
    assert "--ablate needs --direction" in fails(*base, "--ablate", code=2)
    assert "--add needs --direction" in fails(*base, "--add", "1", code=2)
    assert "--compare needs --direction" in fails(*base, "--compare", code=2)
    both = ("--direction", run, "--ablate", "--add", "1")
    assert "exclude each other" in fails(*base, *both, code=2)
    assert "takes a number" in fails(*base, "--direction", run, "--add", "nan", code=2)
    assert "--temperature" in fails(*base, "--temperature", "-1", code=2)
    assert "does not exist" in fails(*base, "--direction", tmp_path / "no.safetensors", code=3)
    wide, unplaced = tmp_path / "wide.safetensors", tmp_path / "unplaced.safetensors"
    save_file({"direction": torch.ones(7)}, wide)
    save_file({"direction": torch.ones(128)}, unplaced)
    assert "made for another model" in fails(*base, "--direction", wide, code=3)
    line = fails(*base, "--direction", unplaced, "--add", "1", code=2)
    assert "does not record its layer" in line
    for lines, said in {
        ("/abalte",): "unknown command '/abalte'",
        ("/",): "unknown command '/'",
        ("/ablate",): "pass --direction",
        ("/add",): "pass --direction",
        ("/add much",): "takes a number, not 'much'",
        ("/off now",): "/off takes no argument",
    }.items():
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        assert said in fails(*base, code=2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 600))
    line = fails(*base, "--json", code=3)
    assert "context is 512" in line
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    assert "not UTF-8" in fails(*base, "--json", code=3)


def test_quit_and_empty_lines(talk, answered: str) -> None:
    result = talk("", answered, "/quit", answered, options=("--json",))
    assert result.code == 0, result.err
    assert len(result.json["turns"]) == 1
    assert talk().out == ""


class Terminal:
    """A command at a pseudo-terminal."""

    def __init__(self, *args: str | Path) -> None:
        self._end, other = pty.openpty()
        self._running = warm_python().start(
            *("-m", "abliterate", *args),
            streams=(other, other, other),
            env={"TERM": "xterm", "COLUMNS": "160", "LINES": "50"},
            terminal=True,
        )
        os.close(other)
        self.text = ""

    def until(self, wanted: str) -> str:
        """Read on until ``wanted`` appears; returns what came before it."""
        while wanted not in self.text:
            assert select.select([self._end], [], [], 600)[0], self.text
            piece = os.read(self._end, 4096)
            assert piece, self.text
            self.text += piece.decode(errors="replace")
        before, _, self.text = self.text.partition(wanted)
        return before

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def press(self, key: str, wanted: str) -> None:
        """Press a key until ``wanted`` appears.

        A Ctrl-C between the prompt and readline's wait for a key is seen with the next key only.
        """
        while wanted not in self.text:
            self.type(key)
            if select.select([self._end], [], [], 2)[0]:
                self.text += os.read(self._end, 4096).decode(errors="replace")
        self.until(wanted)

    def code(self) -> int:
        """Wait for the end; the exit code."""
        try:
            while os.read(self._end, 4096):
                pass
        except OSError:
            pass  # how Linux says that the other side is closed
        os.close(self._end)
        return self._running.wait()


def test_at_a_terminal(model: Path, run: Path, refused: str) -> None:
    terminal = Terminal("chat", model, "--direction", run, "--ablate", "--compare", *SHORT)
    terminal.until("(ablate)")
    terminal.until("> ")
    terminal.type("/nonsense\r")
    terminal.until("error: unknown command '/nonsense'")  # and the conversation goes on
    terminal.until("> ")
    terminal.type("/add 2\r")
    terminal.until("(add 2)")
    terminal.until("> ")
    terminal.type(f"{refused}\r")
    heading = terminal.until("add 2").splitlines()[-1]
    assert "baseline" in heading  # the columns stand side by side
    terminal.until("> ")
    terminal.press("\x03", "(Ctrl-D or /quit leaves)")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.code() == 0
