"""Prompt sources and sampling, through the command line and the library."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from abliterate.errors import InputError
from abliterate.prompts.hub_datasets import HubDataset
from abliterate.prompts.sampling import load_prompts, normalise, prompt_key
from abliterate.prompts.sources import BUNDLED, PRESETS, SPLITS, read_source

JBB_CATEGORIES = {
    "Harassment/Discrimination",
    "Malware/Hacking",
    "Physical harm",
    "Economic harm",
    "Fraud/Deception",
    "Disinformation",
    "Sexual/Adult content",
    "Privacy",
    "Expert advice",
    "Government decision-making",
}


def test_bundled_sets_are_large_distinct_and_categorised(cli) -> None:
    seen: dict[str, str] = {}
    for name in BUNDLED:
        document = cli("prompts", name, "--json").json
        counts = {split: document["splits"][split]["distinct"] for split in SPLITS}
        assert counts["train"] >= 160
        assert counts["val"] >= 40
        assert counts["test"] >= 100
        for split in SPLITS:
            assert set(document["splits"][split]["categories"]) == JBB_CATEGORIES
            assert document["splits"][split]["distinct"] == document["splits"][split]["prompts"]
            for prompt in read_source(name).splits[split]:
                key = normalise(prompt.text)
                assert key not in seen, f"{prompt.text!r} is in {seen.get(key)} and {name}/{split}"
                seen[key] = f"{name}/{split}"


def test_harmful_and_harmless_match_in_length_and_opening() -> None:
    for split in SPLITS:
        words = {}
        openings = {}
        for name in BUNDLED:
            prompts = read_source(name).splits[split]
            words[name] = sum(len(p.text.split()) for p in prompts) / len(prompts)
            openings[name] = sorted(p.text.split()[0] for p in prompts)
        assert abs(words["harmful"] - words["harmless"]) < 0.3
        assert openings["harmful"] == openings["harmless"]


@pytest.mark.parametrize("kind", ["txt", "json", "json-objects", "jsonl", "csv", "parquet"])
def test_every_file_type_gives_the_same_prompts(kind: str, cli, tmp_path: Path) -> None:
    texts = ["Bake a cake, please", "Größe of Ærø?", "Knit a hat"]
    rows = [{"id": i, "Goal": text, "Category": f"c{i % 2}"} for i, text in enumerate(texts)]
    path = tmp_path / f"set.{kind.split('-')[0]}"
    if kind == "txt":
        path.write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(texts), encoding="utf-8")
    elif kind == "json-objects":
        path.write_text(json.dumps({"version": 1, "prompts": rows}), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif kind == "csv":
        lines = [f'{r["id"]},"{r["Goal"]}",{r["Category"]}' for r in rows]
        path.write_text("id,Goal,Category\r\n" + "\r\n".join(lines), encoding="utf-8-sig")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    document = cli("prompts", path, "--json", "--examples", "9").json
    assert {e["text"] for e in document["examples"]} == set(texts)
    expected = {"c0": 2, "c1": 1} if kind not in ("txt", "json") else {}
    assert document["splits"]["all"]["categories"] == expected


def test_a_column_can_be_named_and_wins_over_detection(cli, tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("prompt,wish\nwrong,right\n")
    assert cli("prompts", f"{path}[wish]", "--json").json["examples"][0]["text"] == "right"
    assert cli("prompts", path, "--json").json["examples"][0]["text"] == "wrong"


def test_sampling_is_seeded_and_independent_of_row_order(tmp_path: Path) -> None:
    texts = [f"Describe the number {i}" for i in range(50)]
    forward, backward = tmp_path / "a.txt", tmp_path / "b.txt"
    forward.write_text("\n".join(texts))
    backward.write_text("\n".join(reversed(texts)))
    first = load_prompts(str(forward), n=10, seed=3)
    assert first == load_prompts(str(backward), n=10, seed=3)
    assert first != load_prompts(str(forward), n=10, seed=4)


def test_duplicates_and_used_prompts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "set.txt"
    path.write_text("Bake a cake\nbake  a CAKE!\nKnit a hat\nSew a coat\n")
    assert [p.text for p in load_prompts(str(path))] == ["Bake a cake", "Knit a hat", "Sew a coat"]
    left = load_prompts(str(path), exclude=[prompt_key("knit a hat.")])
    assert [p.text for p in left] == ["Bake a cake", "Sew a coat"]
    with pytest.raises(InputError, match="has 2 distinct prompts left"):
        load_prompts(str(path), n=3, exclude=[prompt_key("knit a hat.")])


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n\n", "is empty"),
        ("blank.jsonl", b'{"prompt": " "}\n', "holds no prompts"),
        ("bytes.txt", b"fine\nbad \xff\n", "line 2: byte 0xff is not UTF-8"),
        ("column.csv", b"id,wish\n1,cake\n", "has none of the columns"),
        ("broken.json", b'["a", ', "not valid JSON"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "line 2: not valid JSON"),
        ("number.json", b"[1, 2]", "entry 1: expected a string"),
        ("nottext.jsonl", b'{"prompt": ["a"]}\n', "the prompt is no text but list"),
        ("broken.parquet", b"PAR1 no PAR1", "is not a readable parquet file"),
        ("set.xlsx", b"zip", "unknown file type"),
    ],
)
def test_bad_files_give_one_line(name, content, message, fails, tmp_path: Path) -> None:
    path = _write(tmp_path / name, content)
    line = fails("prompts", path, code=3)
    assert str(path) in line
    assert message in line


def test_bad_sources_give_one_line(fails, tmp_path: Path) -> None:
    assert "does not exist" in fails("prompts", tmp_path / "none.txt", code=3)
    assert "is a folder" in fails("prompts", tmp_path, code=3)
    assert "neither a set" in fails("prompts", "no-such-set", code=3)
    path = _write(tmp_path / "set.csv", b"prompt\ncake\n")
    assert "no column 'wish' (it has: prompt)" in fails("prompts", f"{path}[wish]", code=3)
    plain = _write(tmp_path / "set.txt", b"cake\n")
    assert "has no columns" in fails("prompts", f"{plain}[wish]", code=3)


def test_unreachable_hub_gives_one_line(fails) -> None:
    line = fails("prompts", "no-such-org/no-such-set@main:train[text]", code=3)
    assert "no-such-org/no-such-set@main:train[text]" in line
    assert "is not whole in the cache at 'main' and HF_HUB_OFFLINE is set" in line


def test_hub_sources_reach_datasets_with_all_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(dataset, commits, count, streaming=False):  # stands in for the network
        calls.append((dataset.id, dataset.config, dataset.split, dataset.revision))
        commits[dataset.name] = "a" * 40
        return [
            {"Goal": "Bake", "prompt": "a", "instruction": "a", "Category": "x", "input": ""},
            {"Goal": "Sum this", "prompt": "b", "instruction": "b", "input": "1 2"},
        ]

    monkeypatch.setattr(HubDataset, "_load", load)
    source = read_source("org/name/part@v1.0:train[:10%][Goal]")
    assert calls == [("org/name", "part", "train[:10%]", "v1.0")]
    assert [(p.text, p.category) for p in source.splits["all"]] == [("Bake", "x")]
    for preset in PRESETS:
        read_source(preset)
    assert ("JailbreakBench/JBB-Behaviors", "behaviors", "harmful", None) in calls
    assert ("tatsu-lab/alpaca", None, "train", None) in calls
