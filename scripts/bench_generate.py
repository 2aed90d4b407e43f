"""Time answers under hooks against bare ``model.generate``, in one process.

    python scripts/bench_generate.py [data/demo-model | smollm2-135m | qwen2.5-0.5b | MODEL]

Prompts are of mixed length, and their answers run from 5 to 256 tokens: whatever the model would
say, its logits are made to end an answer once prompt and answer together fill a period of 257
tokens. The bare side runs static, left-padded batches of several sizes; its best one counts. Both
sides must say the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    Qwen2Config,
)

from abliterate import ablate
from abliterate.inference.decoding import decoding_config, plain_decoding
from abliterate.inference.generation import greedy_answers, stop_tokens
from abliterate.inference.replayable_hooks import replayable
from abliterate.models.library_versions import cache_name
from abliterate.models.loading import Checkpoint, LoadedModel
from abliterate.writers import find_writers, stream_width

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "data/demo-model"
PERIOD, END = 257, 0

SHAPES: dict[str, Callable[[], Any]] = {
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
    "qwen2.5-0.5b": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip


def load(name: str, device: str) -> LoadedModel:
    """A model of that shape with random weights, or the checkpoint of that name."""
    torch.manual_seed(0)
    if name in SHAPES:
        model = AutoModelForCausalLM.from_config(SHAPES[name]())
    else:
        config = AutoConfig.from_pretrained(name)
        config.max_position_embeddings = max(config.max_position_embeddings, 1024)
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
    model.generation_config.eos_token_id = END
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    return LoadedModel(model.to(device).eval(), tokenizer, Checkpoint(name, ROOT))


def end_by_period(loaded: LoadedModel) -> None:
    """Logits that end an answer where prompt and answer fill a period, and nowhere else."""
    model: Any = loaded.model
    stops = torch.tensor(stop_tokens(loaded), device=model.device)
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions, ids = kwargs.get("position_ids"), kwargs["input_ids"]
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        # Continuous batching names the tokens of its one row whose logits it wants.
        keep = kwargs.get("logits_to_keep")
        seen["positions"] = positions[:, keep] if torch.is_tensor(keep) else positions[:, -1:]

    def end(module: Any, args: Any, logits: Any) -> Any:
        logits.index_fill_(-1, stops, -1e4)
        positions = seen["positions"]
        last = logits[:, -positions.shape[1] :, END]
        last.copy_(torch.where((positions + 2) % PERIOD == 0, 1e4, last))
        return logits

    model.register_forward_pre_hook(replayable(note), with_kwargs=True)
    model.get_output_embeddings().register_forward_hook(replayable(end))


def bare(loaded: LoadedModel, prompts: Sequence[list[int]], size: int) -> list[list[int]]:
    """The simplest thing: static batches, in the order of the prompts."""
    model: Any = loaded.model
    answers: list[list[int]] = []
    for first in range(0, len(prompts), size):
        some = prompts[first : first + size]
        width = max(map(len, some))
        ids = torch.tensor([[END] * (width - len(p)) + p for p in some], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some]).to(ids)
        with plain_decoding(model), torch.inference_mode():
            said = model.generate(
                input_ids=ids, attention_mask=mask,
                generation_config=decoding_config([END], PERIOD - 1, pad_token_id=END),
            )  # fmt: skip
        rows = said[:, width:].tolist()
        answers += [row[: row.index(END) + 1] if END in row else row for row in rows]
    return answers


def continuous(loaded: LoadedModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The library's continuous batching, as it sets itself up."""
    model: Any = loaded.model
    with plain_decoding(model):  # its thread knows nothing of an inference mode here
        said = model.generate_batch(
            inputs=prompts,
            generation_config=decoding_config([END], PERIOD - 1, pad_token_id=END),
            progress_bar=False,
        )
    return [list(one.generated_tokens) for one in said.values()]


def floor(loaded: LoadedModel, prompts: Sequence[list[int]], counts: Sequence[int]) -> float:
    """Seconds of the passes that cannot be left out, each as long as the bare model takes for it.

    Every prompt is read once, without padding, and each of its answer's tokens is said in a pass of
    the rows that still speak: no fewer passes are possible than the longest answer has tokens.
    """
    model: Any = loaded.model
    read, said = sum(map(len, prompts)), sum(counts)
    width = (read + said // 2) // len(prompts)  # what a row has behind it, on average

    def seconds(rows: int) -> float:
        ids = torch.full((rows, width), 3, device=model.device)
        best = float("inf")
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            model.get_decoder()(input_ids=ids, **{cache_name(): cache})
            for _ in range(3):
                started = time.perf_counter()
                model(input_ids=ids[:, :1], **{cache_name(): cache}).logits.argmax(-1).tolist()
                best = min(best, time.perf_counter() - started)
        return best

    ids = torch.full((8, width), 3, device=model.device)
    with torch.inference_mode():
        started = time.perf_counter()
        model.get_decoder()(input_ids=ids, use_cache=False)
        reading = (time.perf_counter() - started) / ids.numel() * read
    # A pass takes a part that every row adds to, and one that it has anyway: two sizes tell both.
    few, many = 4, min(32, len(prompts))
    each = (seconds(many) - seconds(few)) / (many - few)
    return reading + each * said + (seconds(few) - few * each) * max(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(DEMO))
    parser.add_argument("--prompts", type=int, default=128, help="16 take minutes on a 0.5B shape")
    parser.add_argument("--sizes", help="of bare batches (8,16,32,64,128, up to all prompts)")
    parser.add_argument("--repeats", type=int, default=1, help="of all sides in turn; best counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--continuous", action="store_true", help="the library's continuous batching, too"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = [int(size) for size in (args.sizes or "8,16,32,64,128").split(",")]
    if args.sizes is None:  # the smallest that holds all of them, and none beyond
        sizes = [size for size in sizes if size < args.prompts] + [args.prompts]
    loaded = load(args.model, args.device)
    end_by_period(loaded)
    generator = torch.Generator().manual_seed(0)
    # Lengths from 2 to 253 leave 256 to 5 tokens of the first period, or of the second.
    lengths = torch.randint(2, 253, (args.prompts,), generator=generator).tolist()
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    prompts = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    direction = torch.randn(
        stream_width(loaded.model, find_writers(loaded.model)), generator=generator
    )

    def ours() -> list[list[int]]:
        return greedy_answers(loaded, prompts, PERIOD - 1)

    def hooked() -> list[list[int]]:
        with ablate(loaded.model, direction):
            return ours()

    sides: dict[str, Callable[[], list[list[int]]]] = {
        **{f"bare, {n} rows": lambda n=n: bare(loaded, prompts, n)  # type: ignore[misc]
           for n in sizes},
        **({"continuous batching": lambda: continuous(loaded, prompts)} if args.continuous else {}),
        "abliterate": ours,
        "abliterate, hooks on": hooked,
    }  # fmt: skip
    bare(loaded, prompts[:2], 2)
    best: dict[str, tuple[float, float]] = {}
    said: dict[str, list[list[int]]] = {}
    for turn in range(args.repeats):
        for name, run in sides.items():
            started, worked = time.perf_counter(), time.process_time()
            said[name] = run()
            if args.device != "cpu":
                torch.accelerator.synchronize()
            took = time.perf_counter() - started, time.process_time() - worked
            best[name] = min(best.get(name, took), took)
            print(f"turn {turn + 1}: {name} {took[0]:.1f} s", file=sys.stderr, flush=True)
    counts = [len(answer) for answer in said["abliterate"]]
    print(f"{args.model}: {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, "
          f"answers of {min(counts)} to {max(counts)} ({sum(counts):,} in all), "
          f"{loaded.model.dtype}, {args.device}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, transformers {transformers.__version__}\n")  # fmt: skip
    for name, (value, cpu) in best.items():
        print(f"{name:<24} {value:8.2f} s   {sum(counts) / value:8.1f} tokens/s   "
              f"{cpu:8.2f} CPU s")  # fmt: skip
    fastest = min((name for name in best if name.startswith("bare")), key=best.__getitem__)
    others = [name for name in best if not name.startswith("bare")]
    least = floor(loaded, prompts, counts)
    print(f"floor: the bare model's passes over the rows that still speak, without padding, take "
          f"{least:.2f} s: {best[fastest][0] / least:.2f}x {fastest}")  # fmt: skip
    print()
    for name in others:
        same = sum(a == b for a, b in zip(said[name], said[fastest], strict=True))
        wall, cpu = (base / own for base, own in zip(best[fastest], best[name], strict=True))
        answers = "" if "hooks" in name else f", {same} of {len(prompts)} answers the same"
        print(f"{name}: {wall:.2f}x {fastest} ({cpu:.2f}x in CPU seconds){answers}")


if __name__ == "__main__":
    main()
