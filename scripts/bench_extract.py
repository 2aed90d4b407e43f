"""Time extraction against bare forward passes over the same tokens, in one process.

    python scripts/bench_extract.py [data/demo-model | qwen2.5-0.5b | llama-3.2-1b | MODEL]

The bare pass runs the model on the very batches that extraction makes, without hooks and with the
logits of the last token only; each is the best of ``--repeats`` runs, in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from bench_select import load
from torch import Tensor

from abliterate.extraction.mean_activations import mean_resid_pre
from abliterate.inference.forward import Batch, for_each_batch, last_logits

ROOT = Path(__file__).resolve().parents[1]


def seconds(run: Callable[[], object], on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "data/demo-model"))
    parser.add_argument("--n-train", type=int, default=128)
    parser.add_argument("--positions", default="-5,-4,-3,-2,-1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    args.n_val = 8
    torch.set_num_threads(args.threads)
    model, ids, positions, tokens = load(args.model, args)
    prompts = [ids["harmful-train"], ids["harmless-train"]]
    on_gpu = model.device.type == "cuda"

    def bare() -> None:
        def run(batch: Batch) -> None:
            last_logits(model, batch)

        with torch.inference_mode():
            for rows in prompts:
                for_each_batch(model, rows, run)

    def extract() -> list[Tensor]:
        """Both means, with the refusal filter at work."""
        signs = (1.0, -1.0)
        return [
            mean_resid_pre(model, rows, positions, tokens, sign)[0]
            for rows, sign in zip(prompts, signs, strict=True)
        ]

    bare()
    extract()
    times: dict[str, list[float]] = {"bare forward": [], "extract": []}
    for _ in range(args.repeats):
        times["bare forward"].append(seconds(bare, on_gpu))
        times["extract"].append(seconds(extract, on_gpu))
    best = {name: min(values) for name, values in times.items()}
    n_tokens = sum(len(row) for rows in prompts for row in rows)
    print(f"{args.model}: {sum(map(len, prompts))} prompts, {n_tokens:,} tokens, "
          f"{len(positions)} positions, {model.dtype}, {model.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
          f"{transformers.__version__}\n")  # fmt: skip
    print("| run | seconds | of bare forward |")
    print("|---|---:|---:|")
    for name, value in best.items():
        print(f"| {name} | {value:.3f} | {value / best['bare forward']:.2f}x |")


if __name__ == "__main__":
    main()
