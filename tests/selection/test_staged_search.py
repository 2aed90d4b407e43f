"""The staged search, its shortcuts and what it leaves out, against the plainest computation."""

from __future__ import annotations

import math
import random
import shutil
from dataclasses import replace
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
    MixtralConfig,
    PreTrainedModel,
)

from abliterate import ablate
from abliterate.inference.batched_interventions import InterventionRunner
from abliterate.inference.candidate_batches import FastPathFlags
from abliterate.inference.fast_path import verified_runner
from abliterate.inference.forward import all_last_logits, can_pad, last_logits, left_pad
from abliterate.inference.in_memory import InMemoryEngine
from abliterate.inference.rounding import COARSE, LARGEST_ROUNDING, off_by, rounding_of_batches
from abliterate.inference.token_batches import TokenBudget, group_rows
from abliterate.metrics.logit_metrics import refusal_metric
from abliterate.metrics.refusal import MAX_REFUSAL_SCORE, kl_divergence, kl_floor, refusal_score
from abliterate.models.loading import LoadedModel
from abliterate.selection.candidate_filters import Score, Thresholds, apply_filters, best_candidate
from abliterate.selection.candidate_search import CandidateSearch
from abliterate.selection.few_passes import FewPassesSearch
from abliterate.selection.reference import score_candidate_reference
from abliterate.selection.score_table import score_record
from abliterate.selection.search_inputs import SearchInputs

KINDS = ("llama", "llama-bias", "qwen2", "gemma", "mistral")
TOKENS = (40, 41)
POSITIONS = (-3, -1)


def _task(folder: Path | PreTrainedModel, **changes) -> SearchInputs:
    """Eight candidates on uneven prompts that share their first six tokens."""
    model = folder
    if isinstance(folder, Path):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    numbers = random.Random(3)

    def prompts(count: int) -> list[list[int]]:
        return [[5, 6, 7, 8, 9, 10, *numbers.choices(range(20, 500), k=numbers.randrange(4, 16)),
                 11, 12] for _ in range(count)]  # fmt: skip

    generator = torch.Generator().manual_seed(4)
    directions = torch.randn(2, 4, 48, generator=generator, dtype=torch.float64)
    # From no effect to a large one, so that filters have something to tell apart.
    directions *= torch.tensor([0.3, 1.0, 3.0, 6.0]).view(1, 4, 1)
    directions[0, 0] = 0.0
    task = SearchInputs(model, directions, POSITIONS, prompts(7), prompts(10), TOKENS)
    return replace(task, **changes)


def _plain(task: SearchInputs) -> dict[tuple[int, int], Score]:
    """One candidate and prompt at a time."""
    keys = [(position, layer) for position in task.positions for layer in range(4)]
    return {key: score_candidate_reference(task, key) for key in keys}


def _agree(one: Score, other: Score) -> None:
    assert (one.position, one.layer) == (other.position, other.layer)
    for metric in other.computed:
        expected = getattr(one, metric)
        assert getattr(other, metric) == pytest.approx(expected, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_staged_exhaustive_and_plain_choose_the_same(kind: str, tiny) -> None:
    task = _task(tiny(kind))
    plain = _plain(task)
    complete = CandidateSearch(replace(task, search="exhaustive"))
    exhaustive = complete.run()
    for score in exhaustive:
        assert len(score.computed) == 3
        _agree(plain[score.position, score.layer], score)
    finite = [s for s in exhaustive if not math.isnan(s.induce_score)]
    numbers = random.Random(5)
    winners, spared, stopped = set(), 0, 0
    for trial in range(15):
        # Thresholds around the scores themselves, and at them.
        kl = numbers.choice(finite).kl_divergence * numbers.choice((1.0, 1.0, 0.99, 1.01))
        induce = numbers.choice(finite).induce_score + numbers.choice((0.0, -0.01, 0.01))
        if trial % 5 == 0:
            # A refusal score cannot be this high in a random model: partial sums reject early.
            induce = 17.0
        thresholds = Thresholds(kl + 1e-5, induce - 1e-5, numbers.choice((0.0, 0.2, 0.5)))
        search = CandidateSearch(
            replace(task, thresholds=thresholds, all_layers=numbers.random() < 0.3)
        )
        search.replay = complete.replay  # proved once: the model and the prompts are the same
        # What follows where nothing passes is not asked about here.
        search._complete_front = lambda: None
        staged = search.run()
        judged = apply_filters(staged, 4, thresholds)
        expected = best_candidate(apply_filters(exhaustive, 4, thresholds))
        found = best_candidate(judged)
        assert (found and (found.position, found.layer)) == (
            expected and (expected.position, expected.layer)
        )
        winners.add(expected and (expected.position, expected.layer))
        assert all(score.reason != "unknown" for score in judged)
        for one, other in zip(exhaustive, staged, strict=True):
            _agree(one, other)
            if other.kl_at_least is not None and not math.isnan(one.kl_divergence):
                assert thresholds.kl < other.kl_at_least <= one.kl_divergence + 1e-4
                stopped += 1
            if other.induce_at_most is not None:
                assert thresholds.induce > other.induce_at_most >= one.induce_score - 1e-4
                stopped += 1
            spared += 3 - len(other.computed)
    assert len(winners) > 2
    assert spared > 60
    assert stopped > 6


def test_few_passes_in_memory_agree_with_plain(tiny) -> None:
    task = _task(tiny("llama"), search="exhaustive", batch_size=3)
    harmful, harmless = torch.ones(7, dtype=torch.bool), torch.ones(10, dtype=torch.bool)
    harmful[2], harmless[-3] = False, False
    search = FewPassesSearch(InMemoryEngine(LoadedModel(task.model, None, None)), task)
    search.measure_baselines()
    refused, answered = search.kept.harmful, search.kept.harmless
    for prompts, scores in ((task.harmful, refused), (task.harmless, answered)):
        logits = all_last_logits(task.model, prompts)
        assert scores == pytest.approx(refusal_score(logits, TOKENS), abs=1e-4)
    kept = replace(
        task,
        harmful=[ids for row, ids in enumerate(task.harmful) if harmful[row]],
        harmless=[ids for row, ids in enumerate(task.harmless) if harmless[row]],
    )
    plain = _plain(kept)
    used = harmful.nonzero()[:, 0], harmless.nonzero()[:, 0]
    for score in search.run(used).scores.values():
        assert len(score.computed) == 3
        _agree(plain[score.position, score.layer], score)


_SIZES = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
          "intermediate_size": 80, "vocab_size": 512, "pad_token_id": 0}  # fmt: skip
OTHERS = {
    # Fused attention and learned positions; sliding windows, post-norms and soft caps; experts;
    # no attention at all.
    "gpt2": lambda: GPT2Config(vocab_size=512, n_embd=48, n_layer=4, n_head=4, n_positions=64),
    "gemma2": lambda: Gemma2Config(**_SIZES, num_key_value_heads=2, head_dim=12, sliding_window=16),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=4),
    "mamba": lambda: MambaConfig(vocab_size=512, hidden_size=48, num_hidden_layers=4),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_score_as_full_passes_do(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHERS[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    task = _task(model, search="exhaustive")
    plain = _plain(task)
    scorer = CandidateSearch(task)
    for score in scorer.run():
        _agree(plain[score.position, score.layer], score)
    assert scorer.replay.tricks.rows
    assert scorer.replay.tricks.resume
    assert bool(scorer.replay.prefix) == (kind in ("gpt2", "mixtral"))


def test_groupings_and_shortcuts_do_not_change_scores(tiny, monkeypatch) -> None:
    task = _task(tiny("qwen2"), search="exhaustive")
    reference = CandidateSearch(task).run()
    for size in (1, 3, 7, 1000):
        for one, other in zip(
            reference, CandidateSearch(replace(task, batch_size=size)).run(), strict=True
        ):
            _agree(one, other)
    for tricks in (
        FastPathFlags(last=False),
        FastPathFlags(prefix=False),
        FastPathFlags(resume=False),
        FastPathFlags(rows=False),
        FastPathFlags(rows=False, prefix=False, resume=False, last=False),
    ):
        scorer = CandidateSearch(task)
        prompts = [*task.harmful, *task.harmless]
        scorer.replay = InterventionRunner(task.model, prompts, "auto", tricks)
        for one, other in zip(reference, scorer.run(), strict=True):
            _agree(one, other)


def test_a_batch_that_does_not_fit_is_split(tiny) -> None:
    task = _task(tiny("llama"), search="exhaustive")
    reference = CandidateSearch(task).run()
    largest = 0

    def crowded(module, args) -> None:
        nonlocal largest
        if args[0].shape[0] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 PiB")
        largest = max(largest, args[0].shape[0])

    scorer = CandidateSearch(task)
    scorer.replay  # noqa: B018  checked before memory runs short
    handle = task.model.lm_head.register_forward_pre_hook(crowded)
    small = scorer.run()
    handle.remove()
    for one, other in zip(reference, small, strict=True):
        _agree(one, other)
    assert largest > 1


def test_candidates_that_join_late_count_by_the_blocks_they_run_on(tiny) -> None:
    task = _task(tiny("llama"))
    runner = InterventionRunner(task.model, task.harmless)
    piece, _ = runner.baseline(runner.piece(task.harmless, range(10)))
    rows, width = piece.batch.input_ids.shape
    runner.budget.tokens = 3 * rows * width  # of 4 blocks each: 12 runs of a block
    vectors = task.directions[1, [1, 1, 2, 2, 2, 3, 3, 3]]
    metric = refusal_metric(TOKENS)
    expected = [
        runner.measure(runner.prefill(vectors[at : at + 1], [layer]), piece, metric)
        for at, layer in enumerate((0, 0, 1, 2, 2, 3, 3, 3))
    ]
    sizes = []
    handle = task.model.lm_head.register_forward_pre_hook(
        lambda module, args: sizes.append(len(args[0]) // rows)
    )
    found = runner.measure(runner.prefill(vectors, (0, 0, 1, 2, 2, 3, 3, 3)), piece, metric)
    again = runner.measure(runner.prefill(vectors), piece, metric)
    handle.remove()
    # Opening tokens, then 4 + 4 + 3 blocks; 2 + 2 + 1 + 1 + 1; ablated in all blocks, 3 at once.
    assert [size for size in sizes if size] == [3, 5, 3, 3, 2]
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    assert again.shape == found.shape


def test_shortcuts_are_used_only_where_they_are_exact(tiny) -> None:
    def chosen(kind: str) -> FastPathFlags:
        task = _task(tiny(kind))
        prompts = [*task.harmful, *task.harmless]
        vectors = task.directions[1, [1, 3]]
        return verified_runner(task.model, prompts, vectors).tricks

    assert chosen("llama") == FastPathFlags()
    # Padding between the shared prefix and a short prompt counts in a sliding window of 16.
    assert not chosen("mistral").prefix
    assert chosen("mistral").resume


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_its_dtype_and_close(dtype: torch.dtype, tiny) -> None:
    task = _task(tiny("llama"), search="exhaustive")
    reference = CandidateSearch(task).run()
    half = replace(task, model=task.model.to(dtype))
    scorer = CandidateSearch(half)
    # Which shortcuts pass the trial depends on how the machine rounds; one way or another they do.
    assert scorer.replay.tricks.rows
    # Seen: 0.15 in bfloat16, 0.013 in float16; the scores spread over 2.
    rounding = {torch.bfloat16: 0.5, torch.float16: 0.1}[dtype]
    for one, other in zip(reference, scorer.run(), strict=True):
        for metric in one.computed:
            expected = getattr(one, metric)
            assert getattr(other, metric) == pytest.approx(expected, abs=rounding, nan_ok=True)


def _rounds_by_batch_size(model: PreTrainedModel, scale: float) -> None:
    """Let every block be off by something in batches of several rows, where kernels change."""

    def off(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        noise = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(1))
        size = scale * hidden.norm(dim=-1, keepdim=True) * (len(hidden) > 1)
        moved = hidden + size * (noise / noise.norm()).to(hidden)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    for block in model.model.layers:
        block.register_forward_hook(off)


def test_batches_that_round_by_their_size_are_told_from_mistakes(tiny, monkeypatch) -> None:
    """Deep models in half precision are off by more than a fixed bound allows (0.052 on a GPU)."""
    task = _task(tiny("llama").resolve())
    model = task.model.to(torch.bfloat16)
    _rounds_by_batch_size(model, 0.012)
    prompts = [*task.harmful, *task.harmless]
    vectors = task.directions[1, [1, 3]]
    ends = [min(prompts, key=len), max(prompts, key=len)]

    def rows(*which: int) -> torch.Tensor:
        with torch.inference_mode():
            return last_logits(model, left_pad(model, [ends[0]] * len(which), which))

    apart = off_by(rows(0, 1, 2, 3)[0], rows(0)[0], fine=False)
    assert COARSE < apart < 1.2 * COARSE  # as on that GPU
    assert can_pad(model)
    assert verified_runner(model, prompts, vectors).tricks == FastPathFlags()

    # The same rounding, and a mistake: the shared opening is one token short of its positions.
    honest = InterventionRunner.piece

    def shifted(self, prompts, rows, keep=1):
        piece = honest(self, prompts, rows, keep)
        if self.prefix:
            piece.batch.position_ids.sub_(1)
        return piece

    monkeypatch.setattr(InterventionRunner, "piece", shifted)
    assert not verified_runner(model, prompts, vectors).tricks.prefix


def test_rows_that_influence_each_other_are_no_rounding() -> None:
    alone = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    noise = 0.05 * torch.randn(2, 100, generator=torch.Generator().manual_seed(1))
    alike = torch.stack([alone + noise] * 4)
    assert rounding_of_batches(alike, alone) == pytest.approx(1.3 * 0.05, rel=0.4)
    assert rounding_of_batches(alone + 10 * (alike - alone), alone) == LARGEST_ROUNDING
    unlike = torch.stack([alone + share * noise for share in (1, 1, 1, 0)])
    assert rounding_of_batches(unlike, alone) == 0


def test_no_kl_is_below_its_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    deepest = 0.0
    for size in (3, 1000, 150_000):
        for scale in (0.0, 1.0, 5.0, 40.0):
            logits = scale * torch.randn(4, size, generator=generator, dtype=torch.float64)
            floor = kl_floor(logits)
            assert bool((floor <= 0).all())
            others = scale * torch.randn(4, size, generator=generator, dtype=torch.float64)
            for other in (others, logits, logits + 0.01 * others, 2 * logits, logits / 2):
                assert bool((kl_divergence(logits, other) >= floor - 1e-12).all())
    # Dust below the epsilon: moving its mass to the one large probability costs less than it pays.
    dust = torch.full((1, 150_001), 0.763e-6, dtype=torch.float64)
    dust[0, 0] = 1 - dust[0, 1:].sum()
    point = torch.zeros_like(dust)
    point[0, 0] = 1.0
    kl = float(kl_divergence(dust.log(), point.log()))
    assert kl < -0.03
    assert kl >= float(kl_floor(dust.log()))
    deepest = float(kl_floor(dust.log()))
    assert deepest > 1.5 * kl
    # A usual, peaked distribution: next to nothing.
    assert float(kl_floor(torch.tensor([[9.0, 5.0, 0.0, -3.0]]))) > -1e-5


def test_no_refusal_score_is_above_the_largest() -> None:
    assert float(refusal_score(torch.tensor([[900.0, 0.0]]), [0])) <= MAX_REFUSAL_SCORE


def test_groups_keep_to_the_budget_and_pad_little() -> None:
    budget = TokenBudget(torch.device("cpu"))
    lengths = [5, 60, 5, 61, 6, 5, 59, 300]
    groups = group_rows(lengths, budget)
    assert sorted(row for group in groups for row in group) == list(range(8))
    assert {frozenset(group) for group in groups} == {
        frozenset({0, 2, 4, 5}), frozenset({1, 3, 6}), frozenset({7})
    }  # fmt: skip
    budget.tokens = 130
    assert all(
        len(group) == 1 or len(group) * max(lengths[row] for row in group) <= 130
        for group in group_rows(lengths, budget)
    )
    assert all(len({lengths[r] for r in g}) == 1 for g in group_rows(lengths, budget, mix=False))
    assert [len(g) for g in group_rows(lengths, TokenBudget(torch.device("cpu"), 3))] != [8]


def test_the_budget_grows_while_that_is_faster_and_halves_without_memory() -> None:
    budget = TokenBudget(torch.device("mps"))
    start = budget.tokens
    budget.ran(10, 1.0)  # too small to tell
    assert budget.tokens == start
    budget.ran(start, 1.0)
    assert budget.tokens == 2 * start
    budget.ran(2 * start, 1.99)  # no faster: taken back, for good
    assert budget.tokens == start
    budget.ran(start, 0.001)
    assert budget.tokens == start
    budget.failed(20, start)
    assert budget.tokens == start // 2
    fixed = TokenBudget(torch.device("cpu"), 8)
    fixed.failed(8, 100)
    assert fixed.rows == 4


def test_the_clock_does_not_decide_which_prompts_share_a_batch_on_a_cpu() -> None:
    budget = TokenBudget(torch.device("cpu"))
    start = budget.tokens
    for seconds in (1.0, 0.1, 0.001):
        budget.ran(budget.tokens, seconds)
    assert budget.tokens == start


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    from abliterate.cli.app import main

    folder = tmp_path_factory.mktemp("staged") / "run"
    extract = ["extract", tiny("qwen2"), "-o", folder, "--no-filter", "--refusal-token", "I",
               "--n-train", "12", "--positions", "-3,-2,-1"]  # fmt: skip
    assert main([*map(str, extract)]) == 0
    return folder


SELECT = ("--no-filter", "--n-val", "9")


def _copy(run: Path, tmp_path: Path, name: str = "run") -> Path:
    return Path(shutil.copytree(run, tmp_path / name))


def _thresholds(exhaustive: dict) -> tuple[str, ...]:
    """Options under which some candidates fail by induce, and at least two pass."""
    finite = [c for c in exhaustive["candidates"] if c["bypass_score"] is not None]
    induce = sorted(c["induce_score"] for c in finite)[2] - 1e-3
    rest = [c for c in finite if c["induce_score"] >= induce and c["layer"] < 3]  # 3 is pruned
    kl = sorted(c["kl_divergence"] for c in rest)[-3] + 1e-3
    return f"--induce-threshold={induce}", "--kl-threshold", str(kl)


def test_selection_says_what_was_left_out_and_refuses_looser_thresholds(
    run: Path, cli, fails, tmp_path: Path
) -> None:
    every = cli("select", _copy(run, tmp_path, "e"), *SELECT, "--search", "exhaustive",
                "--kl-threshold", "1e9", "--induce-threshold=-1e9", "--json").json  # fmt: skip
    assert all(len(c["computed"]) == 3 and not c["unneeded"] for c in every["candidates"])
    options = _thresholds(every)
    folder = _copy(run, tmp_path)
    staged = cli("select", folder, *SELECT, *options, "--json")
    assert staged.code == 0, staged.err
    document = staged.json
    assert document["search"] == "staged"
    by_reason: dict = {}
    for candidate in document["candidates"]:
        by_reason.setdefault(candidate["reason"], []).append(candidate)
        assert set(candidate["computed"]) | set(candidate["unneeded"]) == {
            "bypass_score", "induce_score", "kl_divergence"
        }  # fmt: skip
    assert all(c["computed"] == [] for c in by_reason["layer"])
    assert all(c["unneeded"]["bypass_score"] == "induce" for c in by_reason["induce"])
    for c in by_reason.get("kl", []):
        assert "bypass_score" in c["unneeded"] or c["kl_at_least"] or c["kl_divergence"]
    won = min(c["bypass_score"] for c in by_reason[None])
    assert all(c["unneeded"] == {"kl_divergence": "bypass"} for c in by_reason["bypass"])
    assert all(c["bypass_score"] > won for c in by_reason["bypass"])
    assert all(len(c["computed"]) == 3 for c in by_reason[None])

    table = tmp_path / "e" / "selection.json"
    both = [cli("select", "--scores", t, *options, "--json").json["winner"]
            for t in (table, folder / "selection.json")]  # fmt: skip
    assert both == [document["winner"]] * 2
    again = cli("select", "--scores", folder / "selection.json", *options, "--json").json
    assert again["candidates"] == document["candidates"]
    line = fails("select", "--scores", folder / "selection.json", "--kl-threshold", "1e9",
                 "--induce-threshold=-1e9", code=3)  # fmt: skip
    assert "was not computed" in line
    assert "--search exhaustive" in line
    looser = (options[0], "--prune-layers", "0", *options[1:])
    assert "was not computed" in fails(
        "select", "--scores", folder / "selection.json", *looser, code=3
    )


def test_all_layers_scores_the_pruned_ones_too(run: Path, cli, tmp_path: Path) -> None:
    open_ = ("--kl-threshold", "1e9", "--induce-threshold=-1e9")
    pruned = cli("select", _copy(run, tmp_path, "a"), *SELECT, *open_, "--json").json
    every = cli("select", _copy(run, tmp_path, "b"), *SELECT, *open_, "--all-layers", "--json").json
    assert pruned["winner"] == every["winner"]
    last = [[c for c in d["candidates"] if c["layer"] == 3] for d in (pruned, every)]
    assert all(c["bypass_score"] is None for c in last[0])
    assert all(c["bypass_score"] is not None and not c["kept"] for c in last[1])


def test_ctrl_c_keeps_what_is_finished_and_the_next_run_goes_on(
    run: Path, cli, tmp_path: Path, monkeypatch
) -> None:
    from abliterate.pipeline import scores_file

    open_ = ("--kl-threshold", "1e9", "--induce-threshold=-1e9")
    expected = cli("select", _copy(run, tmp_path, "whole"), *SELECT, *open_, "--json").json
    folder = _copy(run, tmp_path)
    original = scores_file.save_scores

    def interrupt(times: int):
        def save(*args) -> None:
            nonlocal times
            original(*args)
            times -= 1
            if times == 0:
                raise KeyboardInterrupt

        return save

    for times in (1, 2):
        monkeypatch.setattr(scores_file, "save_scores", interrupt(times))
        result = cli("select", folder, *SELECT, *open_)
        assert result.code == 130
        assert not (folder / "selection.json").exists()
        partial = load_file(folder / "scores.safetensors")
        assert partial["induce"].isfinite().any()
    monkeypatch.setattr(scores_file, "save_scores", original)
    result = cli("select", folder, *SELECT, *open_, "--json")
    assert result.code == 0
    assert "going on from" in result.err
    assert result.json["winner"] == expected["winner"]
    for one, other in zip(expected["candidates"], result.json["candidates"], strict=True):
        for key, value in one.items():
            close = pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
            assert other[key] == close
    # Damaged scores, and those of other prompts, are computed again, and one line says so.
    kept = (folder / "scores.safetensors").read_bytes()
    (folder / "scores.safetensors").write_bytes(kept[:-1])
    again = cli("select", folder, *SELECT, *open_, "--json")
    assert "scores.safetensors cannot be read: all is computed again" in again.err
    assert again.json["winner"] == expected["winner"]
    again = cli("select", folder, "--no-filter", "--n-val", "8", *open_, "--json")
    assert "is of other prompts" in again.err
    assert "going on from" not in again.err


def test_kl_on_the_response_averages_over_the_baselines_answer(
    run: Path, cli, fails, tiny, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from abliterate.prompts.sampling import load_prompts

    exhaustive = ("--search", "exhaustive", "--kl-threshold", "1e9", "--induce-threshold=-1e9")
    documents = {
        on: cli("select", _copy(run, tmp_path, on.replace(":", "")), *SELECT, *exhaustive,
                "--kl-on", on, "--json").json
        for on in ("last", "response:1", "response:3")
    }  # fmt: skip
    for one, other in zip(
        documents["last"]["candidates"], documents["response:1"]["candidates"], strict=True
    ):
        assert other["kl_divergence"] == pytest.approx(one["kl_divergence"], abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen2"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny("qwen2"))
    means = load_file(run / "directions.safetensors")
    vector = (means["mean_harmful"] - means["mean_harmless"])[1, 2]
    kls = []
    for prompt in load_prompts("harmless", "val", 9, 0):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], add_generation_prompt=True
        )["input_ids"]
        terms = []
        with torch.no_grad():
            while len(terms) < 3:
                before = model(torch.tensor([ids])).logits[:, -1]
                with ablate(model, vector):
                    after = model(torch.tensor([ids])).logits[:, -1]
                terms.append(float(kl_divergence(before, after)))
                ids = [*ids, int(before.argmax())]
                if ids[-1] == 2:
                    break
        kls.append(sum(terms) / len(terms))
    found = next(c for c in documents["response:3"]["candidates"]
                 if (c["position"], c["layer"]) == (-2, 2))  # fmt: skip
    assert found["kl_divergence"] == pytest.approx(sum(kls) / len(kls), abs=1e-4)
    assert "--kl-on" in fails("select", run, "--kl-on", "response:0", code=2)
    assert "--search" in fails("select", run, "--search", "random", code=2)


def test_a_kl_is_unneeded_only_beside_a_kept_candidate_with_a_lower_bypass() -> None:
    scores = [
        Score(-1, 0, -5.0, 1.0, 0.01),
        Score(-1, 1, -5.0, 1.0),  # a tie goes to the earlier
        Score(-1, 2, -4.0, 1.0),
        Score(-1, 3, -6.0, 1.0, 0.5),
    ]
    reasons = [score.reason for score in apply_filters(scores, 10, Thresholds())]
    assert reasons == [None, "bypass", "bypass", "kl"]
    lower = [*scores, Score(-1, 4, -5.1, 1.0)]
    assert apply_filters(lower, 10, Thresholds())[-1].reason == "unknown"
    assert apply_filters(scores[1:], 10, Thresholds())[0].reason == "unknown"


def test_records_tell_not_finite_from_not_computed() -> None:
    nan = score_record(apply_filters([Score(-1, 0, 1.0, math.nan, 0.0)], 4, Thresholds())[0])
    assert nan["reason"] == "nan"
    assert not nan["unneeded"]
    left_out = score_record(apply_filters([Score(-1, 0, induce_at_most=-1.0)], 4, Thresholds())[0])
    assert left_out["reason"] == "induce"
    assert left_out["unneeded"] == dict.fromkeys(
        ("bypass_score", "induce_score", "kl_divergence"), "induce"
    )
