"""Streaming the layers from disk gives what the model in memory gives, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

COMMON = ("--no-filter", "--refusal-token", "I", "--n-train", "12", "--dtype", "float32")


def _means(run: Path) -> torch.Tensor:
    tensors = load_file(run / "directions.safetensors")
    return torch.stack([tensors["mean_harmful"], tensors["mean_harmless"]])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "mistral"])
def test_extraction_equals_that_of_the_model_in_memory(kind: str, tiny, cli, tmp_path) -> None:
    model = tiny(kind, sharded=True)
    for mode in ("--offload", "--no-offload"):
        result = cli("extract", model, "-o", tmp_path / mode, *COMMON, mode)
        assert result.code == 0, result.err
    streamed, plain = (_means(tmp_path / mode) for mode in ("--offload", "--no-offload"))
    assert (streamed - plain).norm() <= 1e-5 * plain.norm()
    record = json.loads((tmp_path / "--offload" / "extract.json").read_text())
    assert record["offload"]["passes"] == 1
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    # Every weight once; of the embedding, here kept in memory, all rows.
    assert 0.8 * size < record["offload"]["bytes_read"] <= size


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directions of the bundled model, extracted in memory."""
    from abliterate.cli.app import main

    run = tmp_path_factory.mktemp("demo") / "run"
    model = Path(__file__).parents[2] / "data/demo-model"
    sizes = ["--n-train", "48", "--no-offload", "-q"]
    assert main(["extract", str(model), "-o", str(run), *sizes]) == 0
    return run


@pytest.mark.parametrize("options", [(), ("--search", "exhaustive", "--activation-memory", "2MB")])
def test_selection_finds_the_same_winner_with_the_same_scores(
    options: tuple[str, ...], demo_run: Path, cli
) -> None:
    records, n_val = {}, "5" if options else "16"
    for mode in ("--no-offload", "--offload"):
        own = options if mode == "--offload" else options[:2]  # the memory is a streamed model's
        result = cli("select", demo_run, mode, "--n-val", n_val, *own, "--json")
        assert result.code == 0, result.err
        records[mode] = result.json
    plain, streamed = records["--no-offload"], records["--offload"]
    assert streamed["winner"] == plain["winner"]
    assert streamed["offload"]["passes"] == (2 if not options else streamed["offload"]["passes"])
    if options:  # more readings rather than more memory
        assert streamed["offload"]["passes"] > 2
    for metric in ("harmful_refusal_score", "harmless_refusal_score"):
        assert streamed["baselines"][metric] == pytest.approx(plain["baselines"][metric], abs=1e-4)
    compared = 0
    for one, other in zip(plain["candidates"], streamed["candidates"], strict=True):
        assert one["reason"] == other["reason"] or not options
        for metric in one["computed"]:
            assert other[metric] == pytest.approx(one[metric], abs=1e-4)
            compared += 1
    assert compared >= (20 if not options else 60)


def test_verify_measures_the_leak_of_a_streamed_model(demo_run: Path, cli, tmp_path) -> None:
    model = Path(__file__).parents[2] / "data/demo-model"
    vector = load_file(demo_run / "directions.safetensors")
    direction = tmp_path / "direction.safetensors"
    from safetensors.torch import save_file

    save_file({"direction": (vector["mean_harmful"] - vector["mean_harmless"])[-1, 4]}, direction)
    edited = tmp_path / "edited"
    assert cli("orthogonalize", model, "-o", edited, "--direction", direction).code == 0
    for folder, code in ((edited, 0), (model, 6)):
        leaks = []
        for mode in ("--offload", "--no-offload"):
            result = cli(
                "verify", folder, "--direction", direction, "--forward", "--n-prompts", "4", mode,
                "--json",
            )  # fmt: skip
            assert result.code == code, result.err
            leaks.append(result.json["leak"])
        bound = 1e-6 if code == 0 else 1e-3 * leaks[1]
        assert leaks[0] == pytest.approx(leaks[1], abs=bound)
        assert (leaks[0] <= 1e-3) == (code == 0)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_first_token_logits_under_interventions(kind: str, tiny) -> None:
    """What ``evaluate`` scores: baseline, ablate and add together, in one reading."""
    from abliterate.inference.forward import all_last_logits
    from abliterate.inference.interventions import ablate, add
    from abliterate.models.loading import load_model
    from abliterate.offload import open_stream
    from abliterate.offload.streamed_interventions import logits_under

    plain = load_model(str(tiny(kind)), "cpu", "float32").model
    loaded = open_stream(str(tiny(kind)), "cpu", "float32", activation_memory=1 << 20, resident=0)
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prompts = [list(range(3, 3 + n)) for n in (9, 14, 14, 20)]
    got = logits_under(
        loaded.engine.offloaded,
        prompts,
        {"plain": None, "ablate": (vector, None), "add": (vector, 2)},
        2,
    )
    assert loaded.engine.offloaded.passes == 1
    wanted = {
        "plain": all_last_logits(plain, prompts),
        "ablate": all_last_logits(plain, prompts, intervention=ablate(plain, vector)),
        "add": all_last_logits(plain, prompts, intervention=add(plain, vector, 2)),
    }
    assert (wanted["ablate"] - wanted["plain"]).abs().max() > 0.1
    for name, logits in wanted.items():
        assert (got[name] - logits).abs().max() <= 1e-4 * logits.std()


def test_activations_past_their_budget_spill_to_files(tiny, cli, tmp_path: Path) -> None:
    model = tiny("llama")
    long = "and once more, in other words " * 6
    for name in ("harmful", "harmless"):
        (tmp_path / name).with_suffix(".txt").write_text(
            "".join(f"{name} {i} {long}\n" for i in range(12))
        )
    sources = ("--harmful", tmp_path / "harmful.txt", "--harmless", tmp_path / "harmless.txt")
    runs = {}
    for budget in ("1KB", "1GB"):
        run = tmp_path / budget
        result = cli("extract", model, "-o", run, *COMMON, *sources, "--offload",
                     "--activation-memory", budget)  # fmt: skip
        assert result.code == 0, result.err
        runs[budget] = _means(run), json.loads((run / "extract.json").read_text())["offload"]
    assert runs["1KB"][1]["bytes_spilled"] > 1 << 20
    assert runs["1GB"][1]["bytes_spilled"] == 0
    assert torch.equal(runs["1KB"][0], runs["1GB"][0])


def test_wrong_options_and_checkpoints_give_one_line(tiny, fails, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, out = tiny("llama"), tmp_path / "run"
    common = ("extract", model, "-o", out, *COMMON, "--offload")
    assert "--activation-memory" in fails(*common, "--activation-memory", "lots", code=2)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    line = fails("extract", broken, "-o", out, *COMMON, "--offload", code=4)
    assert "model.layers.2.mlp.down_proj.weight" in line
    config = json.loads((model / "config.json").read_text())
    quantised = {"quant_method": "fp8"}
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    assert "quantised" in fails("extract", broken, "-o", out, *COMMON, "--offload", code=4)
    assert not out.exists()


def test_streaming_is_chosen_where_the_weights_do_not_fit(
    tiny, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate.offload import open_model

    monkeypatch.setattr(open_model, "free_memory", lambda device: 200_000)
    result = cli("extract", tiny("llama"), "-o", tmp_path / "run", *COMMON)
    assert result.code == 0, result.err
    assert "its layers are streamed from disk (--offload)" in result.err
    assert json.loads((tmp_path / "run/extract.json").read_text())["offload"]["passes"] == 1


@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3_moe",  # experts that are fused on loading
        "gemma3n_text",  # parallel streams, inputs of each layer, keys and values of other layers
        "gpt2",  # learned positions, transposed matrices
        "zamba2",  # a block that is used at several depths
        "hrm_text",  # blocks that run several times
        "mamba",  # recurrent: no padding
    ],
)
def test_unusual_architectures_stream_as_they_run(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole table: scripts/offload_architectures.py."""
    from architectures.zoo import require_running, tiny_model

    from abliterate.extraction.mean_activations import mean_resid_pre
    from abliterate.models.loading import Checkpoint, load_weights
    from abliterate.offload import open_model
    from abliterate.offload.weight_passes import look

    monkeypatch.setattr(open_model, "load_tokenizer", lambda *_: None)  # prompts are token ids
    model = tiny_model(model_type)
    require_running(model)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path), tmp_path)
    prompts = [list(range(first, first + n)) for first, n in ((3, 8), (20, 12), (40, 16), (60, 8))]
    plain, _ = mean_resid_pre(load_weights(checkpoint, "cpu", "float32"), prompts, [-2, -1])
    loaded = open_model.open_stream(
        checkpoint, "cpu", "float32", activation_memory=1 << 12, resident=0
    )
    _, seen = look(loaded.engine.offloaded, prompts, [-2, -1], 2)
    streamed = seen.mean(0, dtype=torch.float64)
    assert (streamed - plain).norm() <= 1e-5 * plain.norm()


def test_an_error_midway_ends_every_pass(tiny) -> None:
    import threading

    from abliterate.inference.forward import last_logits, left_pad
    from abliterate.offload import BatchRun, open_stream

    stream = open_stream(
        str(tiny("llama")), "cpu", "float32", activation_memory=1 << 20
    ).engine.offloaded
    batches = [left_pad(stream.model, [[5, 6, 7, 8]], [0]) for _ in range(4)]

    def jobs(fail_at: int, done: list[torch.Tensor]) -> list[BatchRun]:
        def see(layer: int, hidden: torch.Tensor, output: object) -> None:
            if layer == fail_at:
                raise KeyboardInterrupt

        return [
            BatchRun(lambda b=b: last_logits(stream.model, b), done.append, (1, 4), see=see)
            for b in batches
        ]

    before = threading.active_count()
    done: list[torch.Tensor] = []
    with pytest.raises(KeyboardInterrupt):
        stream.run(jobs(2, done))
    assert threading.active_count() <= before + 1  # the one that reads ahead
    assert done == []
    stream.run(jobs(99, done))  # and it goes on as if nothing had been
    assert len(done) == 4
    assert all(torch.equal(one, done[0]) for one in done)


def test_evaluate_scores_the_first_tokens_of_a_streamed_model(cli, fails, tmp_path: Path) -> None:
    """``run --offload`` to its end, against ``evaluate`` in memory on the same run folder."""
    model, run = Path(__file__).parents[2] / "data/demo-model", tmp_path / "run"
    sizes = ("--n-train", "24", "--n-val", "6", "--positions", "-1", "--n-test", "6")
    done = cli("run", model, "-o", run, *sizes, "--offload")
    assert done.code == 0, done.err
    assert "not measured" in done.out
    assert done.err.count("answers are not generated under --offload") == 1
    streamed = json.loads((run / "evaluation.json").read_text())
    # One reading for baseline, ablate and add together, one for the edited checkpoint.
    assert list(streamed["offload"]) == ["baseline, ablate, add", "orthogonalized"]
    assert streamed["offload"]["orthogonalized"]["passes"] == 1
    assert not list(run.glob("completions/*.jsonl"))
    again = cli("run", model, "-o", run, *sizes, "--offload")
    assert again.err.count("is up to date") == 4

    common = ("evaluate", model, "--direction", run, "--n-test", "6", "--max-new-tokens", "2",
              "--controls", "0",
              "--intervention", "baseline", "--intervention", "ablate", "--intervention", "add",
              "--intervention", "subtract", "--checkpoint", f"orthogonalized={run / 'model'}",
              "--json")  # fmt: skip
    records = {}
    for mode in ("--offload", "--no-offload"):
        # Without named tokens in the run's record they are detected from the first tokens.
        result = cli(*common, "-o", tmp_path / mode, mode)
        assert result.code == 0, result.err
        records[mode] = result.json["interventions"]
    for name, wanted in records["--no-offload"].items():
        for found in (records["--offload"], streamed["interventions"]):
            if name not in found:
                assert name == "subtract"
                continue
            assert found[name]["kl_divergence"] == pytest.approx(wanted["kl_divergence"], abs=1e-4)
            for kind in ("harmful", "harmless"):
                metric = found[name][kind]["refusal_metric"]
                assert metric == pytest.approx(wanted[kind]["refusal_metric"], abs=1e-4)
                assert found[name][kind]["refused"] is None
                assert wanted[kind]["refused"] is not None
    assert abs(records["--offload"]["add"]["kl_divergence"]) > 1
    assert records["--offload"]["subtract"] != records["--offload"]["add"]

    # Without a run's record the refusal tokens are those that the first tokens show.
    vector = run / "direction.safetensors"
    tokens = [
        cli("evaluate", model, "--direction", vector, "--intervention", "baseline",
            "--max-new-tokens", "1", "--n-test", "6", mode, "--json").json["refusal_tokens"]
        for mode in ("--offload", "--no-offload")
    ]  # fmt: skip
    assert tokens[0] == tokens[1] != []

    pytest.importorskip("plotly")
    assert cli("report", run).code == 0  # the report copes without answers
    assert "not measured" in (run / "report.html").read_text()
    # What does not stream loads the model, whatever the run says.
    assert cli("inspect", run).code == 0
    line = fails("evaluate", model, "--direction", run, "--corpus", "own", "--offload", code=2)
    assert "--corpus" in line


def test_answers_are_refused_with_the_option_to_use(tiny) -> None:
    import abliterate
    from abliterate.errors import UsageError
    from abliterate.offload import open_stream

    loaded = open_stream(str(tiny("llama")), "cpu", "float32", activation_memory=1 << 20)
    prompts = [abliterate.Prompt(f"Question {n}") for n in range(8)]
    means = torch.randn(2, 1, 4, 48, generator=torch.Generator().manual_seed(0)).double()
    extraction = abliterate.Extraction(means[0], means[1], (-1,), ("x",), (5,))
    with pytest.raises(UsageError, match="use kl_on last"):
        abliterate.select(loaded, extraction, prompts, prompts, kl_on="response:2")
    with pytest.raises(UsageError, match="use offload=False"):
        abliterate.evaluate(loaded, prompts, prompts, [5], interventions=["baseline"])
    assert loaded.engine.offloaded.passes == 1  # evaluate's baseline


def test_passes_of_ones_own_are_refused_of_a_streamed_model(tiny) -> None:
    """What no engine names: losses, lm-eval, heads, shares of a direction."""
    import abliterate
    from abliterate.analysis.direction_trace import Tracer
    from abliterate.analysis.fragility import measure
    from abliterate.direction import Direction
    from abliterate.errors import UsageError
    from abliterate.evaluation.lm_eval_tasks import Tasks, run_tasks
    from abliterate.evaluation.losses import measure_loss
    from abliterate.offload import open_stream
    from abliterate.prompts.corpora import Corpus, Example

    loaded = open_stream(str(tiny("llama")), "cpu", "float32", activation_memory=1 << 20)
    direction = Direction(torch.ones(48, dtype=torch.float64), -1, 1)
    prompts = [abliterate.Prompt("Question")]
    asking = {
        "corpus": lambda: measure_loss(loaded, Corpus("c", "c", (Example("one two three"),))),
        "tasks": lambda: run_tasks(loaded, Tasks(("t",), None, None, "0")),
        "trace": lambda: Tracer(loaded, direction).run([], "harmful"),
        "fragility": lambda: measure(loaded, direction, prompts, prompts, [5], [0.0, 1.0]),
    }
    for who, ask in asking.items():
        with pytest.raises(UsageError, match=f"^{who} does not run on a streamed model"):
            ask()
    assert loaded.engine.offloaded.passes == 0


def test_opener_is_chosen_before_anything_is_loaded(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from abliterate.checkpoints.checkpoint import find_checkpoint
    from abliterate.errors import UsageError
    from abliterate.offload import OpenOptions, choose_opener, in_memory_opener, open_model

    checkpoint = find_checkpoint(str(tiny("llama")))
    plain, streamed = (choose_opener(checkpoint, OpenOptions(offload=o)) for o in (None, True))
    assert (plain.generates, streamed.generates) == (True, False)
    plain.require_in_memory("--judge")
    with pytest.raises(UsageError, match="judge does not run on a streamed model"):
        streamed.require_in_memory("--judge")
    with pytest.raises(UsageError, match="activation_memory must be a size"):
        OpenOptions(activation_memory="lots")
    # What needs the model in memory gets it there even under --offload, if there is room.
    assert in_memory_opener(checkpoint, OpenOptions("cpu", offload=True)).generates
    monkeypatch.setattr(open_model, "free_memory", lambda device: 200_000)
    assert not choose_opener(checkpoint, OpenOptions("cpu")).generates
    assert choose_opener(checkpoint, OpenOptions("cpu", offload=False)).generates
    with pytest.raises(UsageError, match="this command needs the model in memory"):
        in_memory_opener(checkpoint, OpenOptions("cpu"))
