"""trace against plain computations: cosines, what heads write, and where they look."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    MambaConfig,
    Qwen3NextConfig,
)

from abliterate.analysis.direction_trace import _mass
from abliterate.cli.app import main
from abliterate.inference.attention_heads import HeadsUnknown, out_projections, watch_heads
from abliterate.metrics.intervals import bootstrap
from abliterate.metrics.paired_tests import holm, signed_rank
from abliterate.metrics.spread import spread
from abliterate.models import loading
from abliterate.prompts.chat_template import ChatFormat, post_instruction_ids
from abliterate.prompts.sampling import load_prompts, prompt_key
from abliterate.prompts.suffixes import Marked, Marker, Span
from abliterate.resources import demo_model_dir
from abliterate.writers.tiny_model import randomise

SUFFIX = "and a poem about lanterns, please"
KINDS = ("harmful", "harmless")


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return {kind: [p.text for p in load_prompts(kind, "test", 5, 3)] for kind in KINDS}


@pytest.fixture
def run(tiny, tmp_path: Path, texts) -> Path:
    """A run on a model whose out-projections have biases, and the prompts in files."""
    folder = tmp_path / "run"
    train = ("--no-filter", "--refusal-token", "I", "--n-train", "8", "--quiet")
    opened = ("--no-filter", "--n-val", "8", "--kl-threshold", "1e9", "--induce-threshold=-1e9")
    assert main(["extract", str(tiny("llama-bias")), "-o", str(folder), *train]) == 0
    assert main(["select", str(folder), *opened, "--quiet"]) == 0
    for kind in KINDS:
        (tmp_path / f"{kind}.txt").write_text("\n".join(texts[kind]))
    return folder


def _sources(run: Path) -> tuple[str | Path, ...]:
    return ("--prompts", run.parent / "harmful.txt", "--harmless", run.parent / "harmless.txt")


def _ids(tokenizer, text: str) -> torch.Tensor:
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]


class Plain:
    """One prompt at a time through the model itself, its inner tensors caught where they arise."""

    def __init__(self, folder: Path, direction: torch.Tensor) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.unit = direction.double() / direction.double().norm()

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list]:
        """Cosines ``[layers]``, heads ``[layers, heads]``, whole ``[layers]``, weights."""
        layers = self.model.model.layers
        read, made = {}, {}

        def catch(at: int):
            def hook(module, args, out) -> None:
                read[at], made[at] = args[0], out

            return hook

        hooks = [
            layer.self_attn.o_proj.register_forward_hook(catch(at))
            for at, layer in enumerate(layers)
        ]
        with torch.no_grad():
            out = self.model(ids, output_hidden_states=True, output_attentions=True)
        for hook in hooks:
            hook.remove()
        last = torch.stack([h[0, -1] for h in out.hidden_states[: len(layers)]]).double()
        cosines = (last @ self.unit) / last.norm(dim=1)
        heads = []
        for at, layer in enumerate(layers):
            weight = layer.self_attn.o_proj.weight.double()
            x = read[at][0, -1].double().reshape(4, 12)
            heads.append(
                torch.stack(
                    [(weight[:, 12 * h : 12 * (h + 1)] @ x[h]) @ self.unit for h in range(4)]
                )
            )
        whole = torch.stack([made[at][0, -1].double() @ self.unit for at in range(len(layers))])
        return cosines, torch.stack(heads), whole, [a[0, :, -1] for a in out.attentions]


def test_cosines_heads_and_attention_equal_a_plain_loop(run: Path, cli, texts, tiny) -> None:
    result = cli(
        "trace", run, *_sources(run), "--suffix", SUFFIX, "--heads", "16", "--batch-size", "2",
        "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    record = result.json
    assert record == json.loads((run / "trace.json").read_text())
    direction = load_file(run / "direction.safetensors")["direction"]
    plain, tokenizer = (
        Plain(tiny("llama-bias"), direction),
        AutoTokenizer.from_pretrained(tiny("llama-bias")),
    )
    given = {
        "harmful": [_ids(tokenizer, text) for text in texts["harmful"]],
        "harmless": [_ids(tokenizer, text) for text in texts["harmless"]],
        "suffix": [_ids(tokenizer, f"{text} {SUFFIX}") for text in texts["harmful"]],
    }
    seen = {kind: [plain(ids) for ids in rows] for kind, rows in given.items()}
    for kind, rows in seen.items():
        cosines = torch.stack([row[0] for row in rows])
        curve = record["cosines"][kind]
        assert curve["n"] == 5
        assert torch.allclose(torch.tensor(curve["mean"]).double(), cosines.mean(0), atol=1e-5)
        assert torch.allclose(torch.tensor(curve["std"]).double(), cosines.std(0), atol=1e-5)
    # Heads and bias are the whole layer, in the plain computation and in the record's own check.
    biases = torch.stack(
        [layer.self_attn.o_proj.bias.double() @ plain.unit for layer in plain.model.model.layers]
    )
    assert biases.abs().max() > 1e-2
    for row in seen["suffix"]:
        assert torch.allclose(row[1].sum(1) + biases, row[2], atol=1e-4)
    assert record["heads"]["largest_error"] < 1e-5
    means = {kind: torch.stack([row[1] for row in rows]).mean(0) for kind, rows in seen.items()}
    change = means["suffix"] - means["harmful"]
    listed = record["heads"]["rows"]
    order = change.abs().flatten().argsort(descending=True).tolist()
    assert [4 * row["layer"] + row["head"] for row in listed] == order
    for row in listed:
        at, head = row["layer"], row["head"]
        assert row["change"] == pytest.approx(float(change[at, head]), abs=1e-4)
        for kind in ("harmful", "suffix"):
            expected = float(means[kind][at, head])
            assert row["contribution"][kind] == pytest.approx(expected, abs=1e-4)
    # The test is of all heads, not of those listed alone.
    each = {kind: torch.stack([row[1] for row in rows]) for kind, rows in seen.items()}
    columns = (each["suffix"] - each["harmful"]).flatten(1).T.tolist()
    p_values = [signed_rank(column) for column in columns]
    assert len(set(p_values)) > 2
    for row in listed:
        flat = 4 * row["layer"] + row["head"]
        assert row["p"]["change"] == pytest.approx(p_values[flat])
        assert row["p_holm"]["change"] == pytest.approx(holm(p_values)[flat])
        assert row["change_std"] == pytest.approx(spread(columns[flat])["sd"], abs=1e-4)
        assert row["change_ci"] == pytest.approx(bootstrap(columns[flat]), abs=1e-4)
    assert record["heads"]["test"]["n_tests"] == 16
    # Attention of the last token: everything before, between and after the two is the template.
    after = len(post_instruction_ids(tokenizer, ChatFormat()))
    header = len(tokenizer("<|start|>user\n", add_special_tokens=False)["input_ids"])
    at, head = listed[0]["layer"], listed[0]["head"]
    masses = []
    for short, long, row in zip(given["harmful"], given["suffix"], seen["suffix"], strict=True):
        seam, weights = short.shape[1] - after, row[3][at][head]
        masses.append((weights[header:seam].sum(), weights[seam : long.shape[1] - after].sum()))
    instruction, suffix = (float(torch.stack(m).mean()) for m in zip(*masses, strict=True))
    looks = listed[0]["attention"]["suffix"]
    assert looks["instruction"] == pytest.approx(instruction, abs=1e-4)
    assert looks["suffix"] == pytest.approx(suffix, abs=1e-4)
    assert listed[0]["attention"]["harmful"]["suffix"] is None


def test_a_template_that_adds_nothing_after_the_instruction(
    tiny, cli, texts, tmp_path: Path
) -> None:
    """The prompt is instruction and suffix alone: they hold all of the attention between them."""
    folder, run = tmp_path / "bare", tmp_path / "run"
    shutil.copytree(tiny("llama-bias"), folder)
    bare = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(bare)
    train = ("--no-filter", "--refusal-token", "I", "--n-train", "8", "--positions", "last", "-q")
    assert cli("extract", folder, "-o", run, *train).code == 0
    opened = ("--no-filter", "--n-val", "8", "--kl-threshold", "1e9", "--induce-threshold=-1e9")
    assert cli("select", run, *opened, "-q").code == 0
    for kind in KINDS:
        (tmp_path / f"{kind}.txt").write_text("\n".join(texts[kind]))
    result = cli("trace", run, *_sources(run), "--suffix", SUFFIX, "--json", "-q")
    assert result.code == 0, result.err
    for head in result.json["heads"]["rows"]:
        looks = head["attention"]
        assert looks["harmful"]["instruction"] == pytest.approx(1.0, abs=1e-4)
        for kind in ("suffix", "random"):
            assert 0 < looks[kind]["suffix"] < 1
            assert sum(looks[kind].values()) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("keys", range(1, 13))
@pytest.mark.parametrize("after", [0, 3])
def test_spans_in_part_or_wholly_outside_a_window(keys: int, after: int) -> None:
    """What the layer does not hold gets none of its attention, and no other token's."""
    n_tokens, border = 12, 6
    whole = torch.rand(2, n_tokens, generator=torch.Generator().manual_seed(keys))
    prompt = Marked(
        tuple(range(n_tokens)),
        Span(2 - n_tokens, border - n_tokens),
        Span(border - n_tokens, -after),
    )
    held = whole[:, n_tokens - keys :]
    places = torch.arange(n_tokens)[n_tokens - keys :]
    expected = [
        held[:, (places >= first) & (places < last)].sum(1)
        for first, last in ((2, border), (border, n_tokens - after))
    ]
    assert torch.allclose(_mass(held, prompt), torch.stack(expected, dim=1))


def test_the_random_suffix_has_the_same_tokens_around_it_and_the_same_length(tiny, texts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    marker = Marker(tokenizer, ChatFormat())
    suffixed = marker.suffixed(texts["harmful"], SUFFIX)
    randomised = marker.randomised(suffixed, 0)
    special = set(tokenizer.all_special_ids)
    inner = []
    for prompt, other in zip(suffixed, randomised, strict=True):
        assert len(other.ids) == len(prompt.ids)
        start, stop = (len(prompt.ids) + at for at in (prompt.suffix.start, prompt.suffix.stop))
        assert other.ids[:start] == prompt.ids[:start]
        assert other.ids[stop:] == prompt.ids[stop:]
        assert tokenizer.decode(prompt.ids[start:stop]).strip() == SUFFIX
        assert not special & set(other.ids[start:stop])
        inner.append(other.ids[start:stop])
        words = tokenizer.decode(prompt.ids[len(prompt.ids) + prompt.instruction.start : start])
        assert words in texts["harmful"]
    assert len(set(inner)) == len(inner)
    assert [p.ids for p in marker.randomised(suffixed, 0)] == [p.ids for p in randomised]
    assert [p.ids for p in marker.randomised(suffixed, 1)] != [p.ids for p in randomised]


def test_an_instruction_that_ends_like_the_suffix_keeps_its_tokens_apart(tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    (marked,) = Marker(tokenizer, ChatFormat()).suffixed(["Say it. now."], "Say it. now.")
    start = len(marked.ids) + marked.suffix.start
    assert tokenizer.decode(marked.ids[start : len(marked.ids) + marked.suffix.stop]) == (
        " Say it. now."
    )


def test_trace_is_reproducible_and_reads_the_suffix_from_a_file(run: Path, cli) -> None:
    (run.parent / "suffix.txt").write_text(SUFFIX + "\n", encoding="utf-8")
    records = []
    for suffix in (SUFFIX, run.parent / "suffix.txt"):
        result = cli("trace", run, *_sources(run), "--suffix", suffix, "--json")
        assert result.code == 0, result.err
        records.append({k: v for k, v in result.json.items() if k != "seconds"})
    assert records[0] == records[1]
    other = cli("trace", run, *_sources(run), "--suffix", SUFFIX, "--seed", "9", "--json")
    assert other.json["cosines"]["random"] != records[0]["cosines"]["random"]
    assert other.json["cosines"]["suffix"] == records[0]["cosines"]["suffix"]


def test_without_a_suffix_only_the_prompts_are_traced(run: Path, cli) -> None:
    result = cli("trace", run, "--n-prompts", "3")
    assert result.code == 0, result.err
    record = json.loads((run / "trace.json").read_text())
    assert set(record["cosines"]) == set(KINDS)
    assert record["suffix"] is record["heads"] is None
    used = json.loads((run / "extract.json").read_text())["prompts"]
    assert used["harmful"]  # the run's own prompts are the default, less those it has used
    held = record["prompts"]["harmful"]
    assert (held["source"], held["n"]) == ("harmful", 3)
    left = [prompt_key(p.text) for p in load_prompts("harmful", "test")]
    assert len(set(held["keys"])) == 3
    assert set(held["keys"]) <= set(left) - set(used["harmful"])


def test_trace_errors_are_one_line(run: Path, fails, tmp_path: Path) -> None:
    assert "abliterate extract" in fails("trace", tmp_path, code=3)
    assert "--suffix" in fails("trace", run, "--suffix", "  ", code=2)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in fails("trace", run, "--suffix", tmp_path / "binary", code=3)
    assert "--heads" in fails("trace", run, "--heads", "0", code=2)
    assert "--n-prompts" in fails("trace", run, "--n-prompts", "0", code=2)
    assert "none.txt" in fails("trace", run, "--prompts", "none.txt", code=3)
    assert not (run / "trace.json").exists()


@pytest.mark.parametrize("command", ["trace", "fragility"])
def test_a_model_of_another_width_is_refused_before_it_is_loaded(
    command: str, run: Path, fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_weights", None)
    line = fails(command, run, "--model", demo_model_dir(), code=3)
    assert "48" in line
    assert "another model" in line


def _random(config, seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model)
    return model


_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**_SIZES, sliding_window=16),  # a post-norm between heads and stream
        GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64),  # Conv1D, bias
    ],
    ids=["gemma2", "gpt2"],
)
def test_heads_and_bias_sum_to_what_the_layer_writes(config) -> None:
    model = _random(config)
    unit = torch.randn(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    unit = unit / unit.norm()
    projections = out_projections(model, unit)
    written = {}
    for at, layer in enumerate(model.get_decoder().layers if config.model_type == "gemma2" else
                               model.transformer.h):  # fmt: skip
        last = getattr(layer, "post_attention_layernorm", None) or layer.attn.c_proj
        last.register_forward_hook(lambda _, args, out, at=at: written.update({at: out[:, -1]}))
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), watch_heads(model, projections, unit) as look:
        model(ids)
        view = look()
    assert view.error < 1e-5
    for at in range(len(projections)):
        whole = written[at].double() @ unit
        heads = view.contributions[:, at].double().sum(1)
        if projections[at].gain is None:
            heads = heads + projections[at].bias
            assert projections[at].bias != 0
        assert torch.allclose(heads, whole, atol=1e-4)
        weights = view.attention[at]
        assert weights is not None
        assert weights.shape == (2, 4, 12)
        assert torch.allclose(weights.sum(2), torch.ones(2, 4), atol=1e-5)


def test_heads_of_other_mixers_are_not_made_up() -> None:
    unit = torch.ones(32, dtype=torch.float64) / 32**0.5
    mamba = _random(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8))
    with pytest.raises(HeadsUnknown, match=r"how many attention heads|no attention layer"):
        out_projections(mamba, unit)
    hybrid = Qwen3NextConfig(
        **_SIZES,
        layer_types=["linear_attention", "full_attention"] * 2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    assert [p.layer for p in out_projections(_random(hybrid), unit)] == [1, 3]
