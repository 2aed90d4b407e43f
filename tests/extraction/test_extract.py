"""Extraction against the plainest possible computation, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate.prompts.chat_template import ChatFormat, encode, post_instruction_ids
from abliterate.prompts.sampling import load_prompts

COMMON = ("--no-filter", "--refusal-token", "I", "--n-train", "12")


def _means(run: Path) -> torch.Tensor:
    tensors = load_file(run / "directions.safetensors")
    assert tensors["mean_harmful"].dtype == torch.float64
    return torch.stack([tensors["mean_harmful"], tensors["mean_harmless"]])


def _plain_means(model_dir: Path, source: str, n: int, positions: list[int]) -> torch.Tensor:
    """One prompt at a time, without padding or hooks: ``hidden_states[l]`` is layer l's input."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    total = 0
    for prompt in load_prompts(source, "train", n, 0):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        layers = torch.stack(states[: model.config.num_hidden_layers])[:, 0, positions]
        total = total + layers.double().transpose(0, 1)
    return total / n


@pytest.mark.parametrize("kind", ["llama", "gemma", "mistral"])
def test_means_equal_a_plain_loop(kind: str, tiny, cli, tmp_path: Path) -> None:
    model = tiny(kind)
    result = cli("extract", model, "-o", tmp_path / "run", *COMMON, "--json")
    assert result.code == 0, result.err
    positions = [entry["position"] for entry in result.json["positions"]]
    # "<|end|>", "\n", "<|start|>", "assistant" in pieces, "\n"
    assert positions == list(range(-len(positions), 0))
    assert result.json["positions"][0]["token"] == "<|end|>"
    assert result.json["positions"][-1]["token"] == "\n"
    got = _means(tmp_path / "run")
    assert got.shape == (2, len(positions), 4, 48)
    for index, source in enumerate(("harmful", "harmless")):
        plain = _plain_means(model, source, 12, positions)
        assert (got[index] - plain).norm() <= 1e-6 * plain.norm()


def _plain_vectors(model_dir: Path, source: str, n: int, positions: list[int]) -> torch.Tensor:
    """Of each prompt, ``[prompts, n_positions, n_layers, d_model]``."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [prompt.text for prompt in load_prompts(source, "train", n, 0)]
    rows = []
    for ids in encode(tokenizer, texts, ChatFormat()):
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        layers = torch.stack(states[: model.config.num_hidden_layers])[:, 0, positions]
        rows.append(layers.double().transpose(0, 1))
    return torch.stack(rows)


def test_split_halves_and_the_error_of_the_norm_equal_a_plain_computation(
    tiny, cli, tmp_path: Path, monkeypatch
) -> None:
    from abliterate.extraction import group_sums

    n, positions = 14, [-3, -1]
    args = ("extract", tiny("llama"), "--no-filter", "--refusal-token", "I", "--n-train", str(n),
            "--positions", "-3,-1", "--json")  # fmt: skip
    record = cli(*args, "-o", tmp_path / "run").json
    vectors = {kind: _plain_vectors(tiny("llama"), kind, n, positions)
               for kind in ("harmful", "harmless")}  # fmt: skip
    halves = []
    for which in (0, 1):
        means = []
        for kind, rows in vectors.items():
            groups = group_sums.assign_groups(n, rows.shape[1:], 0, kind)
            assert sorted(groups) == list(range(n))  # each prompt for itself
            mine = [row for row, group in enumerate(groups) if group % 2 == which]
            assert len(mine) == n // 2
            means.append(rows[mine].mean(0))
        halves.append(means[0] - means[1])
    order = [group_sums.assign_groups(n, (2, 4, 48), 0, kind) for kind in vectors]
    assert order[0] != order[1] != sorted(order[1])
    found = record["stability"]
    assert set(found) == {"split_half_cosine", "norm", "norm_standard_error"}
    for row in range(2):
        for layer in range(4):
            cosine, norm, error = (found[name][row][layer] for name in sorted(
                found, key=["split_half_cosine", "norm", "norm_standard_error"].index))  # fmt: skip
            if layer == 0:  # a template token's embedding: no direction
                assert cosine is None
                assert error is None
                continue
            one, other = (half[row, layer] for half in halves)
            expected = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
            assert cosine == pytest.approx(expected, abs=1e-5)
            samples = [rows[:, row, layer] for rows in vectors.values()]
            direction = samples[0].mean(0) - samples[1].mean(0)
            unit = direction / direction.norm()
            variance = sum(float((rows @ unit).var()) / n for rows in samples)
            assert norm == pytest.approx(float(direction.norm()), rel=1e-5)
            assert error == pytest.approx(variance**0.5, rel=1e-4)
    # Streamed from disk, and of a model so large that groups hold several prompts.
    streamed = cli(*args, "-o", tmp_path / "streamed", "--offload").json["stability"]
    monkeypatch.setattr(group_sums, "_BYTES", 0)
    grouped = cli(*args, "-o", tmp_path / "grouped").json["stability"]
    for row in range(2):
        for layer in range(1, 4):
            for name, values in found.items():
                assert streamed[name][row][layer] == pytest.approx(values[row][layer], rel=1e-4)
            exact = found["norm_standard_error"][row][layer]
            assert 0.4 * exact < grouped["norm_standard_error"][row][layer] < 2.5 * exact
    shown = cli("extract", tiny("llama"), "-o", tmp_path / "run", *args[2:-1]).out
    cosines = [value for value in found["split_half_cosine"][1] if value is not None]
    assert f"{min(cosines):.3f}" in shown
    assert f"{max(cosines):.3f}" in shown


def test_halves_of_other_seeds_are_others_and_filtered_prompts_do_not_count(
    tiny, cli, tmp_path: Path
) -> None:
    from abliterate.extraction.group_sums import GroupSums, assign_groups, stability

    assert assign_groups(32, (1, 1, 4), 0, "harmful") != assign_groups(32, (1, 1, 4), 1, "harmful")
    # Groups that the filter has emptied leave mean and error to the others.
    rows = torch.randn(2, 6, 1, 1, 5, generator=torch.Generator().manual_seed(0)).double()
    rows[0] += 2.0
    counts = torch.tensor([1.0, 1, 0, 1, 1, 0]).double()
    sums = [GroupSums(kind * counts[:, None, None, None], counts) for kind in rows]
    found = stability(*sums)
    kept = [kind[counts > 0][:, 0, 0] for kind in rows]
    direction = kept[0].mean(0) - kept[1].mean(0)
    unit = direction / direction.norm()
    variance = sum(float((kind @ unit).var()) / 4 for kind in kept)
    assert float(found.norm_standard_error) == pytest.approx(variance**0.5)
    assert float(found.norm) == pytest.approx(float(direction.norm()))
    nothing = GroupSums(sums[0].sums * 0, counts * 0)
    assert stability(nothing, sums[1]).split_half_cosine.isnan().all()


def test_means_do_not_depend_on_batching_or_order(tiny, cli, tmp_path: Path) -> None:
    model = tiny("llama")
    files = {}
    for source in ("harmful", "harmless"):
        texts = [p.text for p in load_prompts(source, "train", 12, 0)]
        texts[3] += " " + "and then do it once more in your own words" * 3  # uneven lengths
        for order, name in ((texts, "forward"), (texts[::-1], "backward")):
            files[source, name] = tmp_path / f"{source}-{name}.txt"
            files[source, name].write_text("\n".join(order))
    runs = []
    for name, size in (("forward", "auto"), ("forward", "1"), ("forward", "5"), ("backward", "7")):
        run = tmp_path / f"{name}-{size}"
        sources = ("--harmful", files["harmful", name], "--harmless", files["harmless", name])
        result = cli("extract", model, "-o", run, *COMMON, *sources, "--batch-size", size)
        assert result.code == 0, result.err
        runs.append(_means(run))
    for other in runs[1:]:
        assert (other - runs[0]).norm() <= 1e-6 * runs[0].norm()


def test_extract_record_says_where_it_came_from(tiny, cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli("extract", tiny("llama"), "-o", run, *COMMON, "--positions", "-4,-1").code == 0
    record = json.loads((run / "extract.json").read_text())
    assert [p["position"] for p in record["positions"]] == [-4, -1]
    assert record["model"]["files"]["model.safetensors"].startswith("sha256:")
    assert record["counts"]["harmful"] == {"given": 12, "used": 12}
    assert record["refusal_tokens"][0]["token"] == "I"
    assert record["dtype"] == "float32"
    assert {"python", "torch", "transformers", "abliterate"} <= set(record["versions"])
    assert record["seconds"] > 0
    with safe_open(run / "directions.safetensors", "pt") as file:
        assert json.loads(file.metadata()["positions"]) == [-4, -1]


def test_extraction_is_reproducible_to_the_byte(tiny, cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert cli("extract", tiny("qwen2"), "-o", tmp_path / name, *COMMON).code == 0
    first, second = ((tmp_path / n / "directions.safetensors").read_bytes() for n in "ab")
    assert first == second


def test_system_message_prefix_and_template_variables_reach_the_prompt(tokenizer_dir) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    chat = ChatFormat(system="Be kind.", response_prefix="Sure")
    text = tokenizer.decode(encode(tokenizer, ["Hello"], chat)[0])
    assert text == (
        "<|start|>system\nBe kind.<|end|>\n<|start|>user\nHello<|end|>\n<|start|>assistant\nSure"
    )
    suffix = tokenizer.decode(post_instruction_ids(tokenizer, chat))
    assert suffix == "<|end|>\n<|start|>assistant\nSure"
    tokenizer.chat_template += "{{ mood }}"
    moody = ChatFormat(template_kwargs={"mood": "calm"})
    assert tokenizer.decode(post_instruction_ids(tokenizer, moody)).endswith("assistant\ncalm")


def test_a_random_model_is_told_that_it_does_not_refuse(tiny, fails, tmp_path: Path) -> None:
    line = fails("extract", tiny("llama"), "-o", tmp_path / "run", "--n-train", "12", code=3)
    assert "--refusal-token" in line
    assert not (tmp_path / "run").exists()


def test_filter_that_leaves_too_few_prompts_says_what_to_do(tiny, fails, tmp_path: Path) -> None:
    line = fails(
        "extract",
        tiny("llama"),
        "-o",
        tmp_path / "r",
        "--n-train",
        "12",
        "--refusal-token",
        "I",
        code=3,
    )
    assert "of 12 harmful prompts are refused" in line
    assert "--no-filter" in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--positions", "first"), 2, "--positions"),
        (("--positions", "0,-1"), 2, "--positions"),
        (("--positions", "-300,-1"), 3, "position -300"),
        (("--refusal-token", "I cannot help you"), 2, "--refusal-token"),
        (("--batch-size", "none"), 2, "--batch-size"),
        (("--batch-size", "0"), 2, "--batch-size"),
        (("--dtype", "int3"), 2, "--dtype"),
        (("--device", "abacus"), 2, "--device abacus"),
        (("--n-train", "0"), 2, "--n-train"),
        (("--n-train", "100000"), 3, "lower --n-train"),
        (("--chat-template-kwargs", "{"), 2, "--chat-template-kwargs"),
        (("--harmful", "nothing.txt"), 3, "nothing.txt"),
        (("--no-such-option",), 2, "--no-such-option"),
    ],
)  # fmt: skip
def test_bad_options_give_one_line_and_no_output(
    options, code, message, tiny, fails, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    base = ("--no-filter", "--n-train", "12", "--refusal-token", "I")
    assert message in fails("extract", tiny("llama"), "-o", out, *base, *options, code=code)
    assert not out.exists()


def test_bad_models_give_one_line(tiny, fails, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "run", *COMMON)
    assert "neither an existing folder nor a hub id" in fails("extract", "./no", *out, code=4)
    line = fails("extract", "no-org/no-model", *out, code=4)
    assert "model 'no-org/no-model' is not whole in the cache and HF_HUB_OFFLINE is set" in line
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in fails("extract", empty, *out, code=4)

    def broken(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in tiny("llama").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    pickled = broken("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "never opened" in fails("extract", pickled, *out, code=4)
    truncated = broken("truncated")
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[: len(data) // 2])
    fails("extract", truncated, *out, code=4)
    unknown = broken("unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    assert "'nonesuch'" in fails("extract", unknown, *out, code=4)
    silent = broken("silent")
    (silent / "chat_template.jinja").unlink()
    assert "no chat template" in fails("extract", silent, *out, code=4)
    remote = broken("remote")
    (remote / "config.json").write_text(
        json.dumps(config | {"model_type": "x", "auto_map": {"AutoConfig": "code.C"}})
    )
    (remote / "code.py").write_text("raise SystemExit('this must never run')")
    assert "--trust-remote-code" in fails("extract", remote, *out, code=4)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tiny, fails, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "holey"
    folder.mkdir()
    for file in tiny("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    line = fails("extract", folder, "-o", tmp_path / "run", *COMMON, code=4)
    assert "model.layers.2.mlp.down_proj.weight" in line


def test_positions_that_cannot_be_are_told_before_the_model_is_loaded(
    tiny, fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("abliterate.run_folder.Session.load", load)
    for wrong in ("-2,x", "-1,-1", "1"):
        line = fails("extract", tiny("llama"), "-o", tmp_path, f"--positions={wrong}", code=2)
        assert f"distinct negative numbers such as -5,-1, not '{wrong}'" in line
