"""Time selection against a plain implementation of the paper's procedure, in one process.

    python scripts/bench_select.py [data/demo-model | smollm2-135m | qwen2.5-0.5b | llama-3.2-1b |
                                    MODEL] [--profile]

Runs, on the same prompts and candidates, (a) a plain loop (per candidate three full passes with
hooks, all logits, fixed batches of 32), (b) ``--search exhaustive`` and (c) the default search;
prints a markdown table and fails unless all three select the same candidate and the scores that
they share agree. The named shapes are built with random weights; their thresholds are set so
that about ``--induce-share`` of the candidates pass the induce filter, and ``--kl-share`` of those
the KL filter. By default an eighth passes both, as in the score tables that the paper's authors
published: of the candidates outside the last 20% of layers 4% (Llama-2-7B), 6% (Yi-6B), 13%
(Qwen-1.8B), 19% (Gemma-2B) and 20% (Llama-3-8B) pass.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from abliterate import load_model, load_prompts
from abliterate.extraction.mean_activations import mean_resid_pre
from abliterate.extraction.refusal_token_search import find_refusal_tokens
from abliterate.inference.forward import all_last_logits
from abliterate.metrics.refusal import MAX_REFUSAL_SCORE, refusal_score
from abliterate.prompts.chat_template import ChatFormat, encode, parse_positions
from abliterate.selection.candidate_filters import Score, Thresholds, apply_filters, best_candidate
from abliterate.selection.candidate_search import CandidateSearch
from abliterate.selection.search_inputs import SearchInputs
from abliterate.writers import decoder_blocks

ROOT = Path(__file__).resolve().parents[1]
# Dimensions, and the tokens of the chat template before and after the user's text.
SHAPES: dict[str, tuple[Any, int, int]] = {
    "smollm2-135m": (
        lambda: LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        24,
        5,
    ),
    "qwen2.5-0.5b": (
        lambda: Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        24,
        5,
    ),
    "llama-3.2-1b": (
        lambda: LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
        30,
        5,
    ),
}
PLAIN_BATCH = 32


# --- (a) the paper's procedure, as plainly as it can be written -------------------------------


@contextmanager
def hooks(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ablation_hooks(model: PreTrainedModel, direction: Tensor) -> list[Any]:
    """As in the paper's code: block inputs, attention outputs and MLP outputs are projected."""

    def project(x: Tensor) -> Tensor:
        unit = (direction / (direction.norm() + 1e-8)).to(x)
        return x - (x @ unit).unsqueeze(-1) * unit

    def before(module: Any, args: Any) -> Any:
        return (project(args[0]), *args[1:])

    def after(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (project(output[0]), *output[1:])
        return project(output)

    handles = []
    for block in decoder_blocks(model):
        handles.append(block.register_forward_pre_hook(before))
        handles.append(block.self_attn.register_forward_hook(after))
        handles.append(block.mlp.register_forward_hook(after))
    return handles


def addition_hooks(model: PreTrainedModel, direction: Tensor, layer: int) -> list[Any]:
    def before(module: Any, args: Any) -> Any:
        return (args[0] + direction.to(args[0]), *args[1:])

    return [decoder_blocks(model)[layer].register_forward_pre_hook(before)]


def plain_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Last-token logits by full passes over batches of 32, padded to their longest prompt."""
    rows = []
    for start in range(0, len(prompts), PLAIN_BATCH):
        chunk = prompts[start : start + PLAIN_BATCH]
        width = max(map(len, chunk))
        ids = torch.zeros(len(chunk), width, dtype=torch.long)
        mask = torch.zeros(len(chunk), width, dtype=torch.long)
        for row, prompt in enumerate(chunk):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ids, mask, positions = (t.to(model.device) for t in (ids, mask, positions))
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits
        rows.append(logits[:, -1].double())
    return torch.cat(rows)


def plain_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    return (p * ((p + 1e-6).log() - (q + 1e-6).log())).sum(-1)


def plain_scores(task: SearchInputs) -> list[Score]:
    model, tokens = task.model, task.refusal_tokens
    baseline = plain_logits(model, task.harmless)
    scores = []
    for row, position in enumerate(task.positions):
        for layer in range(task.n_layers):
            direction = task.directions[row, layer].to(model.device)
            if (position, layer) in task.useless():
                scores.append(Score(position, layer, math.nan, math.nan, math.nan))
                continue
            with hooks(ablation_hooks(model, direction)):
                bypass = refusal_score(plain_logits(model, task.harmful), tokens).mean()
            with hooks(ablation_hooks(model, direction)):
                kl = plain_kl(baseline, plain_logits(model, task.harmless)).mean()
            with hooks(addition_hooks(model, direction, layer)):
                induce = refusal_score(plain_logits(model, task.harmless), tokens).mean()
            scores.append(Score(position, layer, float(bypass), float(induce), float(kl)))
    return scores


# --- measuring --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One run: its scores, wall and CPU seconds, tokens x layers that ran, peak memory in bytes."""

    scores: list[Score]
    seconds: float
    cpu: float
    products: int
    memory: int


def measured(model: PreTrainedModel, run: Callable[[], list[Score]]) -> Measured:
    """Run once; tokens are counted where a block's MLP writes, so skipped ones are not."""
    products = 0

    def count(module: Any, args: Any, output: Tensor) -> None:
        nonlocal products
        products += output.shape[:-1].numel()

    handles = [block.mlp.register_forward_hook(count) for block in decoder_blocks(model)]
    on_gpu = model.device.type == "cuda"
    process, peak, done = psutil.Process(), 0, threading.Event()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started, worked = time.perf_counter(), time.process_time()
    with hooks(handles):
        scores = run()
        if on_gpu:
            torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    done.set()
    watcher.join()
    memory = torch.cuda.max_memory_allocated() if on_gpu else peak
    return Measured(scores, seconds, cpu, products, memory)


def compare(first: Sequence[Score], other: Sequence[Score], tolerance: float) -> float:
    """Largest difference of the scores that both have."""
    worst = 0.0
    for one, two in zip(first, other, strict=True):
        assert (one.position, one.layer) == (two.position, two.layer)
        for metric in two.computed:
            a, b = getattr(one, metric), getattr(two, metric)
            if math.isnan(a) and math.isnan(b):
                continue
            assert abs(a - b) <= tolerance, f"{metric} of {two}: {b} is not {a}"
            worst = max(worst, abs(a - b))
    return worst


# --- where the time goes ----------------------------------------------------------------------


def operators(
    run: Callable[[], object], on_gpu: bool
) -> tuple[float, list[tuple[str, int, float]]]:
    """The share of one run that is spent within operators; name, calls and share of the longest.

    On a GPU it is the device's time. All else of a run is Python's, between them. Both are taken
    from the same run, which the profiler makes longer.
    """
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=kinds, acc_events=True) as seen:
        started = time.perf_counter()
        run()
        whole = time.perf_counter() - started
    found = [
        (event.key, event.count, getattr(event, f"self_{'device' if on_gpu else 'cpu'}_time_total"))
        for event in seen.key_averages()
    ]
    found = [(key, count, micros / 1e6 / whole) for key, count, micros in found if micros]
    found.sort(key=lambda row: -row[2])
    return sum(row[2] for row in found), found[:8]


def fewest_passes(
    task: SearchInputs, search: CandidateSearch, gives_up_bypass: bool = False
) -> dict[str, float]:
    """How much of a pass over the prompts of one kind no exact method can do without, by metric.

    A method is exact if it rejects by the paper's filters and by the bounds in docs/performance.md
    alone. Counted is what one would run that knew every score beforehand: of each candidate the
    metric and the prompts that reject it soonest, and all three of the one that is chosen. ``add``
    starts at its own layer.

    Args:
        task: what was searched.
        search: exhaustive, so that every score of every prompt is known.
        gives_up_bypass: with one more bound, which ``select`` does not use: bypass is given up once
            it cannot fall below that of the one that is chosen.
    """
    state, thresholds = search.state, task.thresholds
    judged = apply_filters(list(state.scores.values()), task.n_layers, thresholds)
    winner = best_candidate(judged)
    assert winner is not None
    assert winner.bypass_score is not None
    best = winner.bypass_score
    passes = {"baseline": 1.0, "induce": 0.0, "kl": 0.0, "bypass": 0.0}
    for score in judged:
        key = score.position, score.layer
        if key not in state.usable or score.layer >= task.grid.first_pruned:
            continue
        depth = (task.n_layers - score.layer) / task.n_layers
        of = {"induce": 1.0, "kl": 1.0, "bypass": 1.0}
        if key != (winner.position, winner.layer):
            induce, kl = state.row("induce", key), state.row("kl", key)
            highest = torch.full_like(induce, MAX_REFUSAL_SCORE)
            ways = [{"bypass": 1.0}]
            low = rejects(induce.sort().values, highest, lambda mean: mean < thresholds.induce)
            order = (kl - state.floor).argsort(descending=True)
            high = rejects(kl[order], state.floor[order], lambda mean: mean > thresholds.kl)
            ways += [{"induce": low}] if low else []
            ways += [{"kl": high}] if high else []
            if gives_up_bypass:
                bypass = state.row("bypass", key).sort(descending=True).values
                least = torch.full_like(bypass, -MAX_REFUSAL_SCORE)
                ways += [{"bypass": rejects(bypass, least, best.__lt__) or 1.0}]
            of = min(ways, key=lambda way: way.get("induce", 0.0) * depth + way.get("kl", 0.0)
                     + way.get("bypass", 0.0))  # fmt: skip
        for metric, share in of.items():
            passes[metric] += share * (depth if metric == "induce" else 1.0)
    return passes


def rejects(values: Tensor, missing: Tensor, fails: Callable[[float], bool]) -> float | None:
    """The share of prompts, from the first, after which a bound rejects; None if none does."""
    for count in range(1, len(values) + 1):
        if fails(float(torch.cat([values[:count], missing[count:]]).mean())):
            return count / len(values)
    return None


def show_profile(task: SearchInputs, runs: dict[str, Callable[[], object]]) -> None:
    """Print where the time of each run goes, and the floor."""
    model, on_gpu = task.model, task.model.device.type == "cuda"
    search = CandidateSearch(replace(task, search="exhaustive"))
    search.run()
    plain = min(measured(model, lambda: unhooked(task)).seconds for _ in range(3))
    for title, more in (("floor", False), ("floor if bypass were given up too", True)):
        passes = fewest_passes(task, search, more)
        print(f"\n{title}: {sum(passes.values()):.2f} passes over the prompts of one kind ("
              + ", ".join(f"{metric} {count:.2f}" for metric, count in passes.items())
              + f") of {1e3 * plain:.1f} ms: {sum(passes.values()) * plain:.2f} s")  # fmt: skip
    print("\n| run | seconds | operators | Python between them |")
    print("|---|---:|---:|---:|")
    longest = {}
    for name, run in runs.items():
        seconds = min(measured(model, run).seconds for _ in range(2))
        share, longest[name] = operators(run, on_gpu)
        inside = seconds * min(1.0, share)
        print(f"| {name} | {seconds:.2f} | {inside:.2f} | {seconds - inside:.2f} |")
    for name, rows in longest.items():
        said = ", ".join(f"{key.removeprefix('aten::')} {100 * share:.0f}% in {count:,}"
                         for key, count, share in rows)  # fmt: skip
        print(f"\n{name}: {said}")


def unhooked(task: SearchInputs) -> list[Score]:
    """One pass over the harmless prompts as fast as it gets: no hooks, good batches."""
    all_last_logits(task.model, task.harmless)
    return []


# --- what to run on ---------------------------------------------------------------------------


def load(name: str, args: argparse.Namespace) -> tuple[Any, dict[str, list[list[int]]], Any, Any]:
    """Model, prompts by name, positions and refusal tokens."""
    demo = str(ROOT / "data/demo-model")
    texts = {
        f"{kind}-{split}": [p.text for p in load_prompts(kind, split, count, 0)]
        for kind in ("harmful", "harmless")
        for split, count in (("train", args.n_train), ("val", args.n_val))
    }
    if name not in SHAPES:
        loaded = load_model(name, args.device, args.dtype)
        chat = ChatFormat()
        ids = {key: encode(loaded.tokenizer, value, chat) for key, value in texts.items()}
        positions = parse_positions(args.positions or "post-instruction", loaded.tokenizer, chat)
        tokens = find_refusal_tokens(loaded, ids["harmful-train"], ids["harmless-train"], ())
        return loaded.model, ids, positions, tokens
    config, before, after = SHAPES[name]
    tokenizer = load_model(demo, "cpu").tokenizer
    torch.manual_seed(0)
    dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_config(config(), dtype=dtype).to(args.device).eval()
    numbers = random.Random(0)
    start, end = ([numbers.randrange(2048) for _ in range(n)] for n in (before, after))
    ids = {
        key: [start + list(tokenizer(t, add_special_tokens=False)["input_ids"]) + end for t in text]
        for key, text in texts.items()
    }
    positions = [int(p) for p in (args.positions or "-1").split(",")]
    return model, ids, tuple(positions), [40]


def opened(
    scores: Sequence[Score], n_layers: int, induce_share: float, kl_share: float
) -> Thresholds:
    """Thresholds that these shares of the candidates pass, each filter among what is left."""
    kept = [s for s in apply_filters(scores, n_layers, Thresholds(math.inf, -math.inf)) if s.kept]
    kept.sort(key=lambda s: -(s.induce_score or 0.0))
    kept = kept[: max(1, round(induce_share * len(kept)))]
    induce = min(s.induce_score or 0.0 for s in kept) - 1e-3
    kls = sorted(s.kl_divergence or 0.0 for s in kept)
    return Thresholds(kls[max(1, round(kl_share * len(kls))) - 1] + 1e-5, induce)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "data/demo-model"))
    parser.add_argument("--n-val", type=int, help="validation prompts (32; 16 for random shapes)")
    parser.add_argument("--n-train", type=int, default=32)
    parser.add_argument("--positions", help="e.g. -2,-1 (post-instruction; -1 for random shapes)")
    parser.add_argument("--induce-share", type=float, default=0.25)
    parser.add_argument("--kl-share", type=float, default=0.5)
    parser.add_argument(
        "--open", action="store_true", help="thresholds by these shares for a checkpoint too"
    )
    parser.add_argument("--profile", action="store_true", help="where the time goes, and the floor")
    parser.add_argument(
        "--repeats", type=int, default=1, help="each side, in turn; the best counts"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    random_shape = args.model in SHAPES
    args.n_val = args.n_val or (16 if random_shape else 32)
    model, ids, positions, tokens = load(args.model, args)
    where = {"harmful": 1.0, "harmless": -1.0}
    means = [mean_resid_pre(model, ids[f"{kind}-train"], positions)[0] for kind in where]
    used = {}
    for kind, sign in where.items():
        scores = refusal_score(all_last_logits(model, ids[f"{kind}-val"]), tokens)
        keep = (sign * scores > 0) | random_shape
        used[kind] = [row for row, use in zip(ids[f"{kind}-val"], keep, strict=True) if use]
    task = SearchInputs(
        model,
        means[0] - means[1],
        tuple(positions),
        used["harmful"],
        used["harmless"],
        tuple(tokens),
    )
    exhaustive = measured(model, lambda: CandidateSearch(replace(task, search="exhaustive")).run())
    if random_shape or args.open:
        shares = args.induce_share, args.kl_share
        task = replace(task, thresholds=opened(exhaustive.scores, task.n_layers, *shares))
    sides: dict[str, Callable[[], list[Score]]] = {
        "plain": lambda: plain_scores(task),
        "default": lambda: CandidateSearch(task).run(),
    }
    best: dict[str, Measured] = {}
    for _ in range(args.repeats):
        for name, run in sides.items():
            now = measured(model, run)
            best[name] = min(best.get(name, now), now, key=lambda one: one.seconds)
    plain, staged = best["plain"], best["default"]

    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    names = ("plain", "exhaustive", "default")
    runs = dict(zip(names, (plain, exhaustive, staged), strict=True))
    winners, worst = set(), 0.0
    for run in runs.values():
        winner = best_candidate(apply_filters(run.scores, task.n_layers, task.thresholds))
        assert winner is not None, "no candidate passes"
        winners.add((winner.position, winner.layer))
        worst = max(worst, compare(plain.scores, run.scores, tolerance))
    assert len(winners) == 1, winners
    judged = apply_filters(staged.scores, task.n_layers, task.thresholds)
    lengths = [len(row) for rows in used.values() for row in rows]
    print(f"{args.model}: {len(judged)} candidates ({len(positions)} positions x {task.n_layers} "
          f"layers), {len(used['harmful'])} + {len(used['harmless'])} prompts of "
          f"{min(lengths)} to {max(lengths)} tokens, {model.dtype}, {model.device}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Python "
          f"{platform.python_version()}, {platform.processor() or platform.machine()}")  # fmt: skip
    counts = {metric: sum(metric in s.computed for s in judged)
              for metric in ("induce_score", "kl_divergence", "bypass_score")}  # fmt: skip
    print(f"default computed: {counts}; kept {sum(s.kept for s in judged)}; winner "
          f"{winners.pop()}; largest difference of a score {worst:.1e}\n")  # fmt: skip
    print("| run | seconds | faster | CPU seconds | less | token-layers | fewer | peak memory |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, run in runs.items():
        print(f"| {name} | {run.seconds:.2f} | {plain.seconds / run.seconds:.1f}x | "
              f"{run.cpu:.2f} | {plain.cpu / run.cpu:.1f}x | "
              f"{run.products:,} | {plain.products / run.products:.1f}x | "
              f"{run.memory / 2**20:,.0f} MiB |")  # fmt: skip
    if args.profile:
        show_profile(task, {"default": sides["default"]})


if __name__ == "__main__":
    main()
