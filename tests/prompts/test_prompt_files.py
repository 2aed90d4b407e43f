"""Prompt files and folders as other tools write them, read through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from abliterate.prompts.hub_datasets import HubDataset

TEXTS = ["How do I pick a lock?", "Two\nlines, here", "Emoji 🤖; and a semicolon", "A\ttab"]
COLUMNS = {"text": TEXTS, "label": [1, 2, 3, 4]}


def _turns(text: str, *, role: str = "role", content: str = "content", user: str = "user") -> Any:
    return [
        {role: "system", content: "be brief"},
        {role: user, content: "an earlier question"},
        {role: "assistant", content: "no"},
        {role: user, content: text},
        {role: "assistant", content: "no again"},
    ]


def _lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _table(delimiter: str, end: str = "\n") -> str:
    rows = [f'{n}{delimiter}"{text}"' for n, text in enumerate(TEXTS)]
    return end.join([f"id{delimiter}prompt", *rows])


FILES: dict[str, str] = {
    "by_column.json": json.dumps(COLUMNS),
    "pandas.json": json.dumps({"text": {str(n): text for n, text in enumerate(TEXTS)}}),
    "by_name.json": json.dumps({f"row{n}": {"text": text} for n, text in enumerate(TEXTS)}),
    "nested.json": json.dumps({"prompts": [{"text": text} for text in TEXTS], "meta": {"n": 4}}),
    "splits.json": json.dumps({"test": [{"text": "x"}], "train": [{"text": t} for t in TEXTS]}),
    "equal_splits.json": json.dumps(
        {"train": [{"text": t} for t in TEXTS], "test": [{"text": "x"}] * 4}
    ),
    "messages.jsonl": _lines([{"id": 1, "messages": _turns(text)} for text in TEXTS]),
    "sharegpt.jsonl": _lines(
        [{"conversations": _turns(t, role="from", content="value", user="human")} for t in TEXTS]
    ),
    "conversational.jsonl": _lines([{"prompt": _turns(text)} for text in TEXTS]),
    "parts.jsonl": _lines(
        [{"prompt": [{"type": "image"}, {"type": "text", "text": text}]} for text in TEXTS]
    ),
    "turns_of_parts.jsonl": _lines(
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": t}]}]} for t in TEXTS]
    ),
    "lines.ndjson": _lines([{"text": text} for text in TEXTS]),
    "commas.csv": _table(","),
    "semicolons.csv": "\ufeff" + _table(";", "\r\n"),
    "tabs.csv": _table("\t"),
    "tabs.tsv": _table("\t"),
    "one_column.csv": "prompt\n" + "\n".join(f'"{text}"' for text in TEXTS),
}


@pytest.fixture
def texts_of(cli: Any) -> Callable[..., list[str]]:
    """Every prompt that ``prompts`` shows of a source, in the order of the source's names."""

    def read(source: object) -> list[str]:
        result = cli("prompts", source, "--examples", "1000", "--json")
        assert result.code == 0, result.err
        return sorted(example["text"] for example in result.json["examples"])

    return read


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_tool_gives_its_prompts(name: str, texts_of: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name].encode())
    assert texts_of(tmp_path / name) == sorted(TEXTS)


def test_lines_of_text_end_where_editors_end_them(texts_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\u2028still one\x0bstill\x85still\x1c\r\ntwo\rthree\n\nfour".encode())
    assert texts_of(path) == sorted(
        ["one\u2028still one\x0bstill\x85still", "two", "three", "four"]
    )


def test_folders_of_datasets_are_read(texts_of: Any, fails: Any, tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict(COLUMNS)
    table.save_to_disk(tmp_path / "saved")
    both = datasets.DatasetDict({"train": table, "held.out": table.select([2])})
    both.save_to_disk(tmp_path / "both")
    downloaded = tmp_path / "downloaded"
    (downloaded / "data").mkdir(parents=True)
    table.to_parquet(downloaded / "data" / "train-00000-of-00001.parquet")
    table.select([1]).to_parquet(downloaded / "data" / "test-00000-of-00001.parquet")
    (downloaded / "README.md").write_text("A data set.\n")
    for folder in ("saved", "both", "downloaded"):
        assert texts_of(tmp_path / folder) == sorted(TEXTS)
    assert texts_of(f"{tmp_path / 'both'}:held.out") == [TEXTS[2]]
    assert texts_of(f"{downloaded}:test[text]") == [TEXTS[1]]
    assert "(it has: text, label)" in fails("prompts", f"{downloaded}:test[goal]", code=3)
    assert "has no 'val'" in fails("prompts", f"{downloaded}:val", code=3)
    both.pop("train")
    both["more"] = table
    both.save_to_disk(tmp_path / "neither")
    line = fails("prompts", tmp_path / "neither", code=3)
    assert "splits (held.out, more): name one" in line


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:3]", TEXTS[:3]),
        ("train[-1:]", TEXTS[-1:]),
        ("train[25%:50%]", TEXTS[1:2]),
        ("train[:1]+test[1:]", [TEXTS[0], "y"]),
        ("test", ["x", "y"]),
    ],
)
def test_splits_are_sliced_as_datasets_does(
    split: str, expected: list[str], texts_of: Any, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"train": TEXTS, "test": ["x", "y"]}))
    assert texts_of(f"{path}:{split}") == sorted(expected)


def test_a_slice_and_a_column_are_told_apart(texts_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "goals.csv"
    path.write_text("goal,prompt\na,b\nc,d\n")
    assert texts_of(f"{path}:train[:1]") == ["b"]
    assert texts_of(f"{path}:train[:1][goal]") == ["a"]
    assert texts_of(f"{path}[goal]") == ["a", "c"]
    one = tmp_path / "one.json"
    one.write_text('{"question": ["g", "h"]}')
    assert texts_of(f"{one}:train[:1][question]") == ["g"]
    odd = tmp_path / "a b [goal].csv"
    odd.write_text("goal,prompt\ne,f\n")
    assert texts_of(odd) == ["f"]
    assert texts_of(f"{odd}[goal]") == ["e"]


def test_hub_slices_reach_datasets(monkeypatch: pytest.MonkeyPatch, texts_of: Any) -> None:
    asked = []

    def load(dataset: HubDataset, commits: dict[str, str], *_: Any) -> list[dict[str, str]]:
        asked.append((dataset.id, dataset.config, dataset.split))
        commits[dataset.name] = "a" * 40
        return [{"text": "a", "answer": "b"}]

    monkeypatch.setattr(HubDataset, "_load", load)
    assert texts_of("org/name:train[:10]") == ["a"]
    assert texts_of("org/name/part:train[:10%][answer]") == ["b"]
    assert asked == [("org/name", None, "train[:10]"), ("org/name", "part", "train[:10%]")]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://huggingface.co/datasets/org/name/viewer", "write org/name"),
        ("https://example.org/prompts.csv", "is an address: download it"),
        ("org/name/", "a dataset of the hub is written org/name"),
        ("missing.csv:train[:2]", "missing.csv does not exist"),
        ("missing.csv:train[4", "has no split 'train[4': write one as"),
        ("", "the prompt source is empty"),
    ],
)
def test_what_is_written_otherwise_is_told(source: str, said: str, fails: Any) -> None:
    assert said in fails("prompts", source, code=3)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", json.dumps({"text": ["a"], "label": [1, 2]}), "splits (text, label): name one"),
        ("b.jsonl", _lines([{"messages": [{"role": "assistant", "content": "a"}]}]), "no turn of"),
        ("c.jsonl", _lines([{"prompt": ["a", "b"]}]), "entry 1: the prompt is no text but list"),
        ("d.csv", '"one prompt"\n"another"\n', "name one as SOURCE[column]"),
        ("e.json", "{}", "expected a JSON list"),
        ("f.csv", "prompt,prompt\na,b\n", "the column 'prompt' twice"),
        ("h.csv", "prompt\nwhat, if so\n", "line 2: more columns than the first line names"),
        ("i.tsv", "id\tprompt\n1\ta\tb\n", "line 2: more columns than the first line names"),
        ("j.txt", "one\n\0two\n", "j.txt, line 2: a NUL character"),
        ("k.csv", "p\0r\0o\0", "if the file is UTF-16, save it as UTF-8"),
        ("l.txt", " \r\r\n\t", "is empty"),
        ("m.csv", "prompt\n", "holds no prompts"),
        ("n.parquet", "PAR1", "is not a readable parquet file"),
        ("o.jsonl", _lines([{"conversations": [{"from": "gpt", "value": "a"}]}]), "no turn of"),
        ("g.json[nope]", '{"question": ["a"]}', "has no column 'nope' (it has: question)"),
    ],
)
def test_what_holds_no_prompts_is_one_line(
    name: str, content: str, said: str, fails: Any, tmp_path: Path
) -> None:
    (tmp_path / name.partition("[")[0]).write_text(content)
    assert said in fails("prompts", tmp_path / name, code=3)


def test_a_folder_of_several_configurations(texts_of: Any, fails: Any, tmp_path: Path) -> None:
    """As the hub's repositories have them in their cards."""
    folder, card = tmp_path / "downloaded", "---\nconfigs:\n"
    for name, row in (("easy", "e"), ("hard", "h")):
        (folder / f"of-{name}").mkdir(parents=True)
        (folder / f"of-{name}" / "train.csv").write_text(
            f'id;prompt\n1;"{row}, {row}"\n2;x {row}\n'
        )
        card += f"- config_name: {name}\n  data_files: of-{name}/*.csv\n"
    (folder / "README.md").write_text(f"{card}---\n")
    line = fails("prompts", folder, code=3)
    assert f"has configurations (easy, hard): name one as {folder / 'easy'}" in line
    assert texts_of(folder / "easy") == ["e, e", "x e"]  # semicolons are found in folders too
    assert texts_of(folder / "hard") == ["h, h", "x h"]
    assert texts_of(f"{folder}/easy:train[:1][prompt]") == ["e, e"]


def test_a_saved_folder_names_no_files_elsewhere(fails: Any, tmp_path: Path) -> None:
    saved, other = tmp_path / "saved", tmp_path / "other"
    for place in (saved, other):
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(place)
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"] = [{"filename": f"../other/{state['_data_files'][0]['filename']}"}]
    (saved / "state.json").write_text(json.dumps(state))
    assert "which is no file of the folder's own" in fails("prompts", saved, code=3)
    (other / "dataset_dict.json").write_text('{"splits": ["../saved"]}')
    (other / "state.json").unlink()
    assert "dataset_dict.json names '../saved'" in fails("prompts", other, code=3)


def test_code_in_a_dataset_folder_is_not_run(fails: Any, tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "train.jsonl").write_text(_lines([{"text": "a"}]))
    assert "read by its own code (scripted.py), which is not run" in fails(
        "prompts", folder, code=3
    )
    assert not (tmp_path / "ran").exists()
