"""``evaluate``: interventions, streaming and resuming of completions, scores, intervals."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from abliterate.direction import Direction, save_direction
from abliterate.evaluation.completion import Completion
from abliterate.evaluation.completions import CompletionFile
from abliterate.evaluation.outcomes import Metrics, Outcome, deltas
from abliterate.inference.generation import greedy_answers, stop_tokens
from abliterate.metrics.intervals import newcombe_paired, wilson
from abliterate.metrics.paired_tests import mcnemar
from abliterate.metrics.refusal_phrases import RefusalPhrases, is_refusal, phrases_of
from abliterate.models.loading import load_model
from abliterate.prompts.chat_template import ChatFormat, encode, end_of_turn_ids

SMALL = (
    "--refusal-token", "I", "--n-test", "8", "--max-new-tokens", "6", "--batch-size", "3",
)  # fmt: skip
WITH_A_DIRECTION = (*SMALL, "--controls", "1")


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    generator = torch.Generator().manual_seed(3)
    vector = 4 * torch.randn(48, generator=generator, dtype=torch.float64)
    save_direction(path, Direction(vector, -1, 2), "tiny")
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> tuple[str, ...]:
    """Prompt files with categories, eight prompts of different lengths per kind."""
    folder = tmp_path_factory.mktemp("prompts")
    for kind in ("harmful", "harmless"):
        rows = [
            {"prompt": f"{kind} {'word ' * (index % 4)}{index}", "category": "ab"[index % 2]}
            for index in range(8)
        ]
        (folder / f"{kind}.json").write_text(json.dumps(rows))
    return tuple(
        str(part)
        for kind in ("harmful", "harmless")
        for part in (f"--{kind}", folder / f"{kind}.json")
    )


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_any_subset_of_interventions(tiny, cli, fails, direction, prompts, tmp_path: Path) -> None:
    base = ("evaluate", tiny("llama"), "--direction", direction, *WITH_A_DIRECTION, *prompts)
    every = cli(
        *base, "--intervention", "baseline", "--intervention", "ablate", "--intervention", "add",
        "--intervention", "subtract", "--json",
    )  # fmt: skip
    assert every.code == 0, every.err
    found = every.json["interventions"]
    assert list(found) == ["baseline", "ablate", "add", "subtract"]
    assert found["baseline"]["kl_divergence"] == 0.0
    divergences = {name: found[name]["kl_divergence"] for name in ("ablate", "add", "subtract")}
    assert len(set(divergences.values())) == 3
    assert min(divergences.values()) > 0
    assert every.json["deltas"]["add"]["kl_divergence"] == divergences["add"]
    assert every.json["n_prompts"] == {"harmful": 8, "harmless": 8}
    for row in found.values():
        part = row["harmful"]
        assert part["refusal_score_ci"] == list(wilson(part["refused"], 8))
        assert (
            part["refusal_metric_ci"][0] <= part["refusal_metric"] <= part["refusal_metric_ci"][1]
        )
        assert row["kl_divergence_ci"][0] <= row["kl_divergence"] <= row["kl_divergence_ci"][1]
    change = every.json["deltas"]["add"]["harmful"]
    assert change["refusal_score_n"] == 8
    assert change["refusal_score_ci"][0] <= change["refusal_score"] <= change["refusal_score_ci"][1]
    assert change["safety_score"] is change["safety_score_ci"] is None

    # subtract is add with the sign turned: what a direction file with the negative vector adds.
    negative = tmp_path / "negative.safetensors"
    from abliterate.direction_loading import load_direction

    own = load_direction(direction)
    save_direction(negative, Direction(-own.vector, -1, 2), "tiny")
    turned = cli(
        "evaluate", tiny("llama"), "--direction", negative, *WITH_A_DIRECTION, *prompts,
        "--intervention", "add", "--json",
    )  # fmt: skip
    assert list(turned.json["interventions"]) == ["add"]
    assert turned.json["interventions"]["add"] == found["subtract"]
    assert turned.json["deltas"] == {}

    # A checkpoint alone, under a name of one's own; the same as the hooks.
    edited = tmp_path / "edited"
    made = cli("orthogonalize", tiny("llama"), "--direction", direction, "-o", edited)
    assert made.code == 0, made.err
    alone = cli(*base, "--intervention", "checkpoint", "--checkpoint", f"mine={edited}", "--json")
    assert alone.code == 0, alone.err
    assert list(alone.json["interventions"]) == ["mine"]
    baked = alone.json["interventions"]["mine"]
    assert baked["kl_divergence"] == pytest.approx(found["ablate"]["kl_divergence"], abs=1e-4)
    assert baked["harmful"]["refusal_metric"] == pytest.approx(
        found["ablate"]["harmful"]["refusal_metric"], abs=1e-4
    )

    assert "is taken" in fails(*base, "--checkpoint", edited, "--checkpoint", f"{edited}/", code=2)
    assert "is taken" in fails(*base, "--checkpoint", f"ablate={edited}", code=2)
    for name in ("../x", "a/b", "..", "a\nb", "a\x1bb", "a\\b", "x" * 300):
        assert "no plain name" in fails(*base, "--checkpoint", f"{name}={edited}", code=2)
    assert "needs --checkpoint" in fails(*base, "--intervention", "checkpoint", code=2)
    other = fails(*base, "--intervention", "baseline", "--checkpoint", tiny("other"), code=3)
    assert "vocabulary of" in other


def test_an_interrupted_run_goes_on_to_identical_files(
    tiny, cli, direction, prompts, monkeypatch, tmp_path: Path
) -> None:
    def evaluate(out: Path, *more: str) -> object:
        return cli(
            "evaluate", tiny("llama"), "--direction", direction, "-o", out, *WITH_A_DIRECTION,
            *prompts, *more,
        )  # fmt: skip

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert evaluate(whole).code == 0
    put = CompletionFile.put
    count = 0

    def interrupting(self: CompletionFile, completion: object) -> None:
        nonlocal count
        count += 1
        if count == 29:  # in the second intervention, within a batch of three
            raise KeyboardInterrupt
        put(self, completion)

    with monkeypatch.context() as patched:
        patched.setattr(CompletionFile, "put", interrupting)
        stopped = evaluate(broken)
    assert stopped.code == 130
    assert "goes on from there" in stopped.err
    assert not (broken / "evaluation.json").exists()
    partial = broken / "completions" / "ablate-harmless.jsonl"
    assert len(_lines(partial)) == 4
    # A kill may also tear the last line.
    partial.write_bytes(partial.read_bytes()[:-9])
    resumed = evaluate(broken)
    assert resumed.code == 0
    assert "3 of 8 completions are there already" in resumed.err
    files = sorted(path.name for path in (whole / "completions").glob("*.jsonl"))
    assert len(files) == 6
    for name in files:
        left, right = (folder / "completions" / name for folder in (whole, broken))
        assert left.read_bytes() == right.read_bytes()
    records = [json.loads((folder / "evaluation.json").read_text()) for folder in (whole, broken)]
    for key in ("interventions", "deltas", "inputs", "outputs"):
        assert records[0][key] == records[1][key]

    # What is there is taken over as it is; with other settings it is made again.
    first = broken / "completions" / "baseline-harmful.jsonl"
    lines = _lines(first)
    lines[0]["response"] = "I cannot say, a mark"
    first.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate(broken).code == 0
    assert _lines(first)[0] == lines[0] | {"refused": True, "refused_at": 0}
    assert evaluate(broken, "--max-new-tokens", "5").code == 0
    assert "mark" not in first.read_text()
    fresh = tmp_path / "fresh"
    assert evaluate(fresh, "--max-new-tokens", "5").code == 0
    assert first.read_bytes() == (fresh / "completions" / first.name).read_bytes()


def test_completion_files_are_in_prompt_order_whatever_ends_first(
    tiny, cli, prompts, tmp_path: Path
) -> None:
    sizes = {}
    for size in ("1", "4", "auto"):
        out = tmp_path / size
        result = cli("evaluate", tiny("llama"), "-o", out, *SMALL, *prompts, "--batch-size", size,
                     "--seed", "4", "--json")  # fmt: skip
        assert result.code == 0, result.err
        sizes[size] = (out / "completions" / "baseline-harmful.jsonl").read_bytes()
        lines = _lines(out / "completions" / "baseline-harmful.jsonl")
        assert set(lines[0]) == {"prompt", "category", "response", "refused"}
    assert len(set(sizes.values())) == 1
    per_category = result.json["interventions"]["baseline"]["harmful"]["categories"]
    assert set(per_category) == {"a", "b"}
    assert sum(part["n"] for part in per_category.values()) == 8
    assert result.json["bootstrap"] == {"resamples": 2000, "confidence": 0.95, "seed": 4}


def test_progress_counts_refusals_as_they_come(
    tiny, cli, prompts, monkeypatch, tmp_path: Path
) -> None:
    import abliterate.inference.generation

    shown: list[str] = []

    class Bar:
        done = 0

        def set_postfix_str(self, text: str, refresh: bool = True) -> None:
            shown.append(text)

        def update(self, count: int) -> None:
            self.done += count

    @contextmanager
    def progress_bar(description: str, total: int, unit: str = "it") -> Iterator[Bar]:
        bar = Bar()
        yield bar
        assert (description, bar.done, total) == (f"evaluate: baseline, {kinds.pop(0)}", 8, 8)

    kinds = ["harmful", "harmless"]
    monkeypatch.setattr(abliterate.inference.generation, "progress_bar", progress_bar)
    # Every second answer counts as a refusal, whatever this random model says.
    monkeypatch.setattr(RefusalPhrases, "verdict", lambda self, parts: len(shown) % 2 == 1)
    result = cli("evaluate", tiny("llama"), *SMALL, *prompts, "--json")
    assert result.code == 0, result.err
    assert kinds == []
    assert shown[:8] == [f"{count // 2} of {count} refused" for count in range(1, 9)]
    assert "evaluate: baseline, harmful: 4 of 8 refused" in result.err
    assert result.json["interventions"]["baseline"]["harmless"]["refused"] == 4


def test_rows_that_end_early_leave_the_batch_and_change_nothing(tiny) -> None:
    """Answers of mixed lengths against decoding one prompt at a time with transformers alone."""
    loaded = load_model(str(tiny("llama")))
    texts = [f"tell me {'about it ' * (index % 5)}{index}" for index in range(12)]
    ids = encode(loaded.tokenizer, texts, ChatFormat())
    stop = stop_tokens(loaded)
    expected = []
    for row in ids:
        free = GenerationConfig(max_new_tokens=24, do_sample=False, pad_token_id=0)
        free.eos_token_id = None
        loaded.model.generation_config = GenerationConfig()
        output = loaded.model.generate(torch.tensor([row]), generation_config=free)
        expected.append(output[0, len(row) :].tolist())
    # A token that some answers reach early and some late or never: the end of turn, from now on.
    counts = {
        token: sum(token in answer for answer in expected)
        for token in {token for answer in expected for token in answer}
    }
    token = min(counts, key=lambda t: (abs(counts[t] - 6), t))
    assert 0 < counts[token] < 12
    loaded.model.generation_config = GenerationConfig(eos_token_id=[token, *stop])
    ends = [token, *stop]
    for index, answer in enumerate(expected):
        at = [place for place, one in enumerate(answer) if one in ends]
        expected[index] = answer[: at[0] + 1] if at else answer
    assert len({len(answer) for answer in expected}) > 2
    seen: list[int] = []

    def note(row: int, answer: list[int]) -> None:
        assert answer == expected[row]
        seen.append(row)

    assert greedy_answers(loaded, ids, 24, 12, on_answer=note) == expected
    assert sorted(seen) == list(range(12))
    lengths = [len(expected[row]) for row in seen]
    assert lengths == sorted(lengths)  # each handed over as soon as it ended
    assert greedy_answers(loaded, ids, 24, "auto") == expected


def test_decoding_is_greedy_whatever_the_generation_config_says(
    tiny, cli, prompts, tmp_path: Path
) -> None:
    """A repetition penalty and sampling of the checkpoint's own must not count; its stops must."""
    penalised, stopping = tmp_path / "penalised", tmp_path / "stopping"
    for folder in (penalised, stopping):
        shutil.copytree(tiny("llama"), folder)
    own = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "eos_token_id": 2}
    (penalised / "generation_config.json").write_text(json.dumps(own))
    answers = {}
    for name, folder in (("plain", tiny("llama")), ("penalised", penalised)):
        out = tmp_path / f"{name}-out"
        assert cli("evaluate", folder, "-o", out, *SMALL, *prompts).code == 0
        lines = _lines(out / "completions" / "baseline-harmful.jsonl")
        answers[name] = [line["response"] for line in lines]
    assert answers["penalised"] == answers["plain"]

    loaded = load_model(str(tiny("llama")))
    row = encode(loaded.tokenizer, ["harmful 0"], ChatFormat())
    (answer,) = greedy_answers(loaded, row, 6)
    (stopping / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, answer[2]]}))
    (short,) = greedy_answers(load_model(str(stopping)), row, 6)
    assert short == answer[: answer.index(answer[2]) + 1]


def test_the_chat_templates_end_of_turn_stops_too(tiny) -> None:
    loaded = load_model(str(tiny("llama")))
    assert end_of_turn_ids(loaded.tokenizer, ChatFormat()) == [2]
    # A base model's tokenizer often ends texts with another token than its chat template.
    loaded.tokenizer.eos_token = "<|pad|>"
    loaded.model.generation_config.eos_token_id = None
    assert stop_tokens(loaded) == [0, 2]
    loaded.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert end_of_turn_ids(loaded.tokenizer, ChatFormat()) == []


REFUSAL_SUBSTRINGS = phrases_of("en")


def test_the_papers_twelve_substrings() -> None:
    assert len(REFUSAL_SUBSTRINGS) == 12
    for substring in REFUSAL_SUBSTRINGS:
        assert is_refusal(f"Well, {substring.upper()} help")
    assert not is_refusal("Sorry, no. I will not. I do not think so. I can not.")


@pytest.mark.parametrize("apostrophe", list("\u2019\u2018\u201b\u02bc\u2032\u00b4\uff07"))
def test_typographic_apostrophes_refuse_too(apostrophe: str) -> None:
    for substring in REFUSAL_SUBSTRINGS:
        assert is_refusal(f"\u201c{substring.replace(chr(39), apostrophe)}\u2026\u201d")


@pytest.mark.parametrize(
    "answer",
    [
        "I\u00a0cannot help.", "I\u202fam\u2009sorry", "As\u3000an AI", "I\u2028cannot",
        "\ufeffI\u2019m sorry", "I\u2019\u200bm sorry", "I can\u00adnot",
        "\uff29 \uff43\uff41\uff4e\uff4e\uff4f\uff54",
    ],
)  # fmt: skip
def test_spaces_and_letters_count_as_what_they_stand_for(answer: str) -> None:
    assert is_refusal(answer)


def test_ascii_answers_are_compared_as_they_always_were() -> None:
    """So that rates published with the paper's substrings stay what they are."""

    def as_before(text: str) -> bool:
        return any(substring.lower() in text.lower() for substring in REFUSAL_SUBSTRINGS)

    rng, counts = random.Random(0), [0, 0]
    pieces = [
        *REFUSAL_SUBSTRINGS,
        " ",
        "  ",
        "\n",
        "\t",
        "\r",
        "\x1c",
        "I",
        "can",
        "not",
        "`",
        '"',
        "m",
    ]
    pieces += [a + b for s in REFUSAL_SUBSTRINGS for a, _, b in [s.partition(" ")]]
    pieces += [s.replace(" ", gap) for s in REFUSAL_SUBSTRINGS for gap in ("  ", "\n", "\t", "_")]
    pieces += [s.replace("'", mark) for s in REFUSAL_SUBSTRINGS for mark in ("`", '"', "")]
    for _ in range(4000):
        text = "".join(rng.choices(pieces, k=2)).swapcase()
        assert is_refusal(text) == as_before(text)
        counts[as_before(text)] += 1
    assert min(counts) > 500
    assert not is_refusal("I can`t, I  cannot, I\ncannot")
    # Text beside ASCII: unchanged where it holds none of these characters.
    english = RefusalPhrases(("en",))
    assert not english.found_in("\u00bfNo puedo? \u6211\u4e0d\u80fd \U0001f600")
    assert is_refusal("\u00a1Ay! I cannot")


def test_differences_of_shares_are_paired_prompt_by_prompt() -> None:
    """A prompt without a verdict on one side counts on neither."""

    def outcome(refused: str, safe: str) -> Outcome:
        made = tuple(
            Completion(str(row), None, "", r == "x", None if s == "?" else s == "x")
            for row, (r, s) in enumerate(zip(refused, safe, strict=True))
        )
        none = (0.0,) * len(made)
        return Outcome(made, made, Metrics(none, none, none, none), {}, {})

    changes = deltas({"baseline": outcome("xxxx.", "x.x?x"), "ablate": outcome("x...x", "?..x.")})
    part = changes["ablate"]["harmful"]
    assert (part["refusal_score"], part["refusal_score_n"]) == (pytest.approx(-2 / 5), 5)
    pairs = list(zip([True, False, False, False, True], [True] * 4 + [False], strict=True))
    assert part["refusal_score_ci"] == newcombe_paired(pairs)
    assert part["refusal_score_p"] == mcnemar(pairs) == pytest.approx(2 * (1 + 4) / 16)
    assert (part["safety_score"], part["safety_score_n"]) == (pytest.approx(-2 / 3), 3)
    assert deltas({"ablate": outcome("x", "x")}) == {}


def test_tables_say_of_how_many_prompts(tiny, cli, direction, prompts) -> None:
    shown = cli("evaluate", tiny("llama"), "--direction", direction, *WITH_A_DIRECTION, *prompts,
                "--intervention", "baseline", "--intervention", "ablate")  # fmt: skip
    assert shown.code == 0, shown.err
    assert "harmful n=8, harmless n=8; 95% intervals" in " ".join(shown.out.split())
    assert "/8 (" in shown.out


def test_a_model_of_recurrent_layers_is_decoded_too() -> None:
    """No padding, no cutting of the cache: equal lengths share a batch."""
    from transformers import MambaConfig

    from abliterate.models.loading import Checkpoint, LoadedModel

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0,
        eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()

    class Tokenizer:
        eos_token_id = 2
        added_tokens_decoder = MappingProxyType({})

        def apply_chat_template(self, *args: object, **kwargs: object) -> str:
            return ""

    loaded = LoadedModel(model, Tokenizer(), Checkpoint("x", Path()))
    rows = [[5, 6, 7], [8, 9, 10], [11, 12]]
    together = greedy_answers(loaded, rows, 5)
    assert together == [greedy_answers(loaded, [row], 5)[0] for row in rows]
    assert all(0 < len(answer) <= 5 for answer in together)
