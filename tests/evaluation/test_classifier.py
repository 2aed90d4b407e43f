"""``--classifier``: text classifiers as local judges, through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import LENGTH, word_classifier
from first_tokens import first_token_model

from abliterate.prompts.sampling import prompt_key

ITEMS = [
    ("bread", "No."),
    ("bread", "yes fill"),
    ("bomb", "fill fill"),
    ("bread", "fill [SEP] no"),
    ("bread", "fill " * (2 * LENGTH) + "no"),
    ("bread", "<think>no no</think> yes"),
    ("bread", "<think>no"),
]
# Of the answer alone; the long one is cut before its last word.
SAYS_NO = [True, False, False, True, False, False, None]
CUT = [False, False, False, False, True, False, None]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: Any) -> Path:
    """Label REFUSAL for a text with ``no`` in it."""
    folder = tmp_path_factory.mktemp("classifier") / "refusals"
    return word_classifier(folder, {"no": "REFUSAL"}, ["NOT_REFUSAL", "REFUSAL"])


@pytest.fixture(scope="module")
def topics(tmp_path_factory: Any) -> Path:
    """Three labels by words, none of whose names tells which counts."""
    folder = tmp_path_factory.mktemp("classifier") / "topics"
    return word_classifier(
        folder, {"bomb": "War", "yes": "Peace"}, ["None of both", "War", "Peace"]
    )


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": prompt, "response": response} for prompt, response in ITEMS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _hits(result: Any) -> list[bool | None]:
    assert result.code == 0, result.err
    rows = result.json["completions"]
    return [row["classifier"]["hit"] if "classifier" in row else None for row in rows]


def test_score_counts_the_label_of_answers(cli: Any, refusals: Path, answers: Path) -> None:
    args = ("score", answers, "--classifier", refusals, "--classifier-input", "answer")
    result = cli(*args, "--json")
    assert _hits(result) == SAYS_NO
    rows = result.json["completions"]
    assert [row.get("classifier", {}).get("truncated") for row in rows] == CUT
    assert "1 of 6 answers are longer than it reads, and were cut" in result.err
    scores = result.json["scores"]
    assert (scores["classified"], scores["classifier_truncated"]) == (6, 1)
    assert scores["classifier_rate"] == pytest.approx(2 / 6)
    (pair,) = result.json["agreement"]  # six of seven have an answer
    both = [row for row in rows if row["refused"] is not None]
    apart = sum(row["refused"] != row["classifier"]["hit"] for row in both)
    assert (pair["n"], len(pair["disagreements"])) == (6, apart)
    assert pair["agreed"] == pytest.approx(1 - apart / 6)
    low, high = scores["classifier_rate_ci"]
    assert low < 2 / 6 < high
    held = result.json["classifier"]
    assert (held["label"], held["index"], held["input"]) == ("REFUSAL", 1, "answer")
    assert held["identity"]["files"]["model.safetensors"]
    shown = cli(*args)
    assert "REFUSAL" in shown.out
    assert "33% (" in shown.out
    assert "(1 cut)" in shown.out


def test_prompt_and_answer_go_in_as_a_pair_where_the_tokenizer_makes_pairs(
    cli: Any, fails: Any, topics: Path, answers: Path, tmp_path: Path
) -> None:
    # The word stands in the third prompt alone.
    in_prompt = [False, False, True, False, False, False, None]
    for way in ("auto", "pair"):
        args = ("score", answers, "--classifier", f"{topics}:War", "--classifier-input", way)
        found = cli(*args, "--json")
        assert _hits(found) == in_prompt
        assert found.json["classifier"]["input"] == "pair"  # what was taken
    alone = cli(
        "score", answers, "--classifier", f"{topics}:War", "--classifier-input", "answer", "--json"
    )
    assert not any(_hits(alone))
    bare = word_classifier(tmp_path / "bare", {"bomb": "War"}, ["Peace", "War"], pairs=False)
    found = cli("score", answers, "--classifier", f"{bare}:War", "--json")
    assert not any(_hits(found))
    assert found.json["classifier"]["input"] == "answer"
    line = fails(
        "score", answers, "--classifier", f"{bare}:War", "--classifier-input", "pair", code=2
    )
    assert "sets nothing between two texts" in line


def test_the_label_is_named_or_plain(
    cli: Any, fails: Any, topics: Path, refusals: Path, answers: Path
) -> None:
    def hits(spec: str) -> list[bool | None]:
        way = ("--classifier-input", "answer")
        return _hits(cli("score", answers, "--classifier", spec, *way, "--json"))

    peace = [False, True, False, False, False, True, None]
    assert hits(f"{topics}:Peace") == hits(f"{topics}:peace") == hits(f"{topics}:2") == peace
    assert hits(f"{refusals}:0") == [None if hit is None else not hit for hit in SAYS_NO]
    line = fails("score", answers, "--classifier", topics, code=2)
    assert "has the labels 'None of both', 'War', 'Peace': name the one that counts" in line
    line = fails("score", answers, "--classifier", f"{topics}:Pax", code=2)
    assert "has no label 'Pax' (it has: 'None of both', 'War', 'Peace')" in line
    assert "no label follows" in fails("score", answers, "--classifier", f"{topics}:", code=2)
    assert "--classifier-input has no effect without --classifier" in fails(
        "score", answers, "--classifier-input", "pair", code=2
    )


@pytest.mark.parametrize(
    ("labels", "plain"),
    [
        (["safe", "unsafe"], "unsafe"),
        (["non-toxic", "toxic"], "toxic"),
        (["NORMAL", "REJECTION"], "REJECTION"),
        (["Compliance", "userRefused"], "userRefused"),
        (["LABEL_0", "LABEL_1"], None),
        (["refusal", "unsafe"], None),
    ],
)
def test_a_label_without_a_name_given_is_taken_only_if_plain(
    labels: list[str], plain: str | None, cli: Any, fails: Any, answers: Path, tmp_path: Path
) -> None:
    model = word_classifier(tmp_path / "m", {"no": labels[1]}, labels)
    if plain is None:
        line = fails("score", answers, "--classifier", model, code=2)
        assert f"'{labels[0]}', '{labels[1]}'" in line
    else:
        result = cli("score", answers, "--classifier", model, "--json")
        assert result.json["classifier"]["label"] == plain


def test_labels_for_themselves_are_read_one_by_one(cli: Any, answers: Path, tmp_path: Path) -> None:
    several = word_classifier(
        tmp_path / "several", {"no": "b", "yes": "c"}, ["a", "b", "c"],
        problem_type="multi_label_classification",
    )  # fmt: skip
    way = ("--classifier-input", "answer", "--json")
    assert _hits(cli("score", answers, "--classifier", f"{several}:b", *way)) == SAYS_NO
    one = word_classifier(tmp_path / "one", {"no": "refusal"}, ["refusal"])
    assert _hits(cli("score", answers, "--classifier", one, *way)) == SAYS_NO


def test_what_is_no_classifier_is_refused(
    cli: Any, fails: Any, tiny: Any, refusals: Path, answers: Path, tmp_path: Path
) -> None:
    line = fails("score", answers, "--classifier", f"{tiny('llama')}:x", code=4)
    assert "LlamaForCausalLM is no text classifier" in line
    number = word_classifier(tmp_path / "r", {"no": "s"}, ["s"], problem_type="regression")
    assert "problem_type regression" in fails("score", answers, "--classifier", number, code=4)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in refusals.iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save({"classifier.weight": torch.zeros(2, 16)}, pickled / "pytorch_model.bin")
    assert "never opened" in fails("score", answers, "--classifier", pickled, code=4)
    (pickled / "pytorch_model.bin").unlink()
    # A base model: its head would be random numbers.
    from safetensors.torch import load_file, save_file

    held = load_file(refusals / "model.safetensors")
    save_file(
        {name: t for name, t in held.items() if not name.startswith("classifier")},
        pickled / "model.safetensors",
        {"format": "pt"},
    )
    assert "classifier.bias" in fails("score", answers, "--classifier", pickled, code=4)
    assert "neither an existing folder" in fails(
        "score", answers, "--classifier", "no-such", code=4
    )


def test_a_classifier_of_the_hub_may_name_its_revision(
    fails: Any, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate.errors import CheckpointError
    from abliterate.evaluation import classifier

    asked = []

    def find(name: str) -> None:  # which reads @REVISION itself
        asked.append(name)
        raise CheckpointError("not here")

    monkeypatch.setattr(classifier, "find_checkpoint", find)
    for spec in ("org/m", "org/m:bad: label", "org/m@v1.0", "org/m@v1.0:bad@x"):
        assert "not here" in fails("score", answers, "--classifier", spec, code=4)
    assert asked == ["org/m", "org/m", "org/m@v1.0", "org/m@v1.0"]


def test_a_classifiers_own_code_runs_only_when_trusted(
    cli: Any, fails: Any, refusals: Path, answers: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for file in refusals.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    config = json.loads((own / "config.json").read_text())
    config |= {
        "model_type": "mine-of-old",
        "auto_map": {
            "AutoConfig": "code.MineConfig",
            "AutoModelForSequenceClassification": "code.Mine",
        },
    }
    (own / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (own / "code.py").write_text(
        f"open({str(ran)!r}, 'a').close()\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class MineConfig(BertConfig):\n    model_type = 'mine-of-old'\n"
        "class Mine(BertForSequenceClassification):\n    config_class = MineConfig\n"
    )
    line = fails("score", answers, "--classifier", own, code=4)
    assert "--trust-remote-code" in line
    assert not ran.exists()
    way = ("--classifier-input", "answer", "--trust-remote-code", "--json")
    assert _hits(cli("score", answers, "--classifier", own, *way)) == SAYS_NO
    assert ran.exists()


def test_score_keeps_labels_of_the_same_classifier(
    cli: Any, refusals: Path, topics: Path, answers: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from abliterate.evaluation.classifier import Classifier

    out = tmp_path / "out.jsonl"
    args = ("score", answers, "-o", out, "--json", "--classifier-input", "answer", "--classifier")
    assert _hits(cli(*args, refusals)) == SAYS_NO
    made = out.read_bytes()
    asked: list[int] = []
    classify = Classifier.classify

    def counting(self: Classifier, items: Any, report: Any) -> None:
        asked.append(len(items))
        classify(self, items, report)

    monkeypatch.setattr(Classifier, "classify", counting)
    assert _hits(cli(*args, refusals)) == SAYS_NO
    assert (asked, out.read_bytes()) == ([0], made)
    assert not any(_hits(cli(*args, f"{topics}:War")))
    assert asked == [0, 6]


def test_evaluate_labels_answers_under_every_intervention(
    cli: Any, tokenizer_dir: Path, refusals: Path, tmp_path: Path
) -> None:
    # The model says "nnn" and "yyy", which the classifier knows by their first letters.
    model = first_token_model(tmp_path / "m", tokenizer_dir, {"B": {"n": 0.9}, "G": {"y": 0.9}})
    words = word_classifier(tmp_path / "c", {"no": "refusal"}, ["other", "refusal"])
    vocabulary = json.loads((words / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["nnn"] = vocabulary["model"]["vocab"].pop("no")
    (words / "tokenizer.json").write_text(json.dumps(vocabulary))
    sources = []
    for kind, marker in (("harmful", "B"), ("harmless", "G")):
        path = tmp_path / f"{kind}.txt"
        path.write_text("\n".join(f"{marker}{n}" for n in range(3)))
        sources += [f"--{kind}", str(path)]
    out = tmp_path / "out"
    args = (
        "evaluate", model, "-o", out, *sources, "--intervention", "baseline", "--max-new-tokens",
        "3", "--refusal-token", "I",
    )  # fmt: skip
    result = cli(*args, "--classifier", words)
    assert result.code == 0, result.err
    record = json.loads((out / "evaluation.json").read_text())
    base = record["interventions"]["baseline"]
    assert [base[kind]["classifier_rate"] for kind in ("harmful", "harmless")] == [1.0, 0.0]
    assert base["harmful"]["refusal_score"] == 0.0  # its words are in no list
    assert record["classifier"]["label"] == "refusal"
    assert "harmful refusal" in " ".join(result.out.split())
    # The phrases call none a refusal, the classifier all that answer harmful prompts.
    harmful, harmless = record["agreement"]
    assert (harmful["intervention"], harmful["kind"]) == ("baseline", "harmful")
    assert harmful["raters"] == ["refused", "labelled"]
    assert (harmful["n"], harmful["agreed"], harmful["kappa"]) == (3, 0.0, 0.0)
    assert (harmful["kappa_ci"], harmful["no_interval"]) == (None, "each always says one thing")
    keys = {prompt_key(f"B{n}") for n in range(3)}
    assert set(harmful["disagreements"]) == keys
    assert (harmless["agreed"], harmless["kappa"], harmless["disagreements"]) == (1.0, None, [])
    assert "phrases: refused / classifier: refusal" in " ".join(result.out.split())
    lines = (out / "completions" / "baseline-harmful.jsonl").read_text().splitlines()
    assert all(json.loads(line)["classifier"]["hit"] for line in lines)
    page = tmp_path / "report.html"
    assert cli("report", out, "-o", page).code == 0
    html = page.read_text()
    assert "harmful refusal" in html
    assert "labelled refusal</option>" in html
    assert "3 answers of which they say different things" in html
    data = re.search(r'"rows":(\[.*?\]\]?\}\])', html)
    assert data is not None
    assert "[false,null,null,null,true]" in data[1].replace(" ", "")
    # Without it the figures are gone, and the answers are not made again.
    again = cli(*args)
    assert again.code == 0
    record = json.loads((out / "evaluation.json").read_text())
    assert record["interventions"]["baseline"]["harmful"]["classifier_rate"] is None
    assert record["classifier"] is None


def test_labels_given_before_an_interrupt_are_kept(
    cli: Any, tokenizer_dir: Path, refusals: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from abliterate.evaluation.classifier import Classifier

    model = first_token_model(tmp_path / "m", tokenizer_dir, {"B": {"n": 0.9}, "G": {"y": 0.9}})
    sources = []
    for kind, marker in (("harmful", "B"), ("harmless", "G")):
        path = tmp_path / f"{kind}.txt"
        path.write_text("\n".join(f"{marker}{n}" for n in range(3)))
        sources += [f"--{kind}", str(path)]
    args = (
        "evaluate", model, "-o", tmp_path / "out", *sources, "--intervention", "baseline",
        "--max-new-tokens", "2", "--refusal-token", "I", "--classifier", refusals,
    )  # fmt: skip
    classify, asked = Classifier.classify, []

    def cut_short(self: Classifier, items: Any, report: Any) -> None:
        asked.append(len(items))
        classify(self, items[: len(items) - 4], report)
        if len(asked) == 1:
            raise KeyboardInterrupt
        classify(self, items[len(items) - 4 :], lambda row, v: report(len(items) - 4 + row, v))

    monkeypatch.setattr(Classifier, "classify", cut_short)
    assert cli(*args).code == 130
    done = cli(*args, "--json")
    assert done.code == 0, done.err
    assert asked == [6, 4]
    for kind in ("harmful", "harmless"):
        assert done.json["interventions"]["baseline"][kind]["classified"] == 3
        lines = (tmp_path / "out" / "completions" / f"baseline-{kind}.jsonl").read_text()
        assert lines.count('"classifier"') == lines.count("\n") == 3


def test_run_refuses_a_wrong_classifier_before_any_work(
    fails: Any, tiny: Any, topics: Path, tmp_path: Path
) -> None:
    line = fails("run", tiny("llama"), "-o", tmp_path / "run", "--classifier", topics, code=2)
    assert "name the one that counts" in line
    single = word_classifier(tmp_path / "single", {"bomb": "unsafe"}, ["safe", "unsafe"], False)
    line = fails("run", tiny("llama"), "-o", tmp_path / "run", "--classifier", single,
                 "--classifier-input", "pair", code=2)  # fmt: skip
    assert "sets nothing between two texts" in line
    assert not (tmp_path / "run" / "extract.json").exists()
