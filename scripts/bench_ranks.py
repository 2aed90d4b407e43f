"""What ranks save: extract and select by one process, by data parallel and tensor parallel ranks.

    python scripts/bench_ranks.py [--layers N] [--width N] [--ranks 1,2,4] [--n-train N] [--n-val N]

Every run goes through ``torchrun`` and the command line, one thread a rank, on a random Llama with
the demo model's tokenizer. For each stage it prints the wall time, the CPU time of the busiest rank
(which other load on the machine changes little), its ratio to one process, and the memory of the
largest rank. Fails unless all choose the same direction and have the same means to 1e-6.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHOICE = ("--no-filter", "--kl-threshold", "1000", "--induce-threshold=-1000")


def worker(args: list[str]) -> int:
    """One rank: the command line, with its stage measured into ``$BENCH/RANK.json``."""
    from abliterate.cli.app import main
    from abliterate.pipeline import extract_stage, select_stage

    def measured(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **more: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            result = work(*given, **more)
            figures = {
                "wall": time.perf_counter() - wall,
                "cpu": time.process_time() - cpu,
                "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
            rank = os.environ.get("RANK", "0")
            Path(os.environ["BENCH"], f"{rank}.json").write_text(json.dumps(figures))
            return result

        return run

    extract_stage.extract = measured(extract_stage.extract)
    select_stage.select = measured(select_stage.select)
    return main(args)


def make_model(folder: Path, layers: int, width: int) -> float:
    """A random Llama; returns its size in MiB."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from abliterate.resources import demo_model_dir

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False,
        max_position_embeddings=256, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_model_dir() / name, folder / name)
    return sum(p.numel() for p in model.parameters()) * 4 / 2**20


def stage(ranks: int, where: Path, *args: str | Path) -> dict[str, float]:
    """Run one command on ``ranks`` ranks; the largest of each figure."""
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, __file__, "--worker", *map(str, args), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCH": str(where)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    figures = [json.loads(path.read_text()) for path in where.glob("*.json")]
    assert len(figures) == ranks
    return {name: max(one[name] for one in figures) for name in figures[0]}


def check(run: Path, reference: Path) -> None:
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "directions.safetensors") for folder in (run, reference))
    for name, mean in theirs.items():
        assert (ours[name] - mean).abs().max() <= 1e-6 * mean.abs().max(), name
    winners = [json.loads((f / "selection.json").read_text())["winner"] for f in (run, reference)]
    assert winners[0] == winners[1], winners


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--n-train", default="64")
    parser.add_argument("--n-val", default="16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_model(folder / "model", options.layers, options.width)
        print(f"{options.layers} layers of {options.width}, {size:.0f} MiB of weights")
        counts = [int(count) for count in options.ranks.split(",")]
        modes = [(count, ()) for count in counts]
        modes += [(count, ("--tensor-parallel",)) for count in counts if count > 1]
        bases: dict[str, float] = {}
        print("| ranks | mode | stage | wall s | CPU s | of one process | peak MiB |")
        print("|---:|---|---|---:|---:|---:|---:|")
        for ranks, extra in modes:
            run = folder / f"run-{ranks}-{len(extra)}"
            commands = {
                "extract": ("extract", folder / "model", "-o", run, "--n-train", options.n_train,
                            "--no-filter", "--refusal-token", "40"),
                "select": ("select", run, "--n-val", options.n_val, *CHOICE),
            }  # fmt: skip
            for label, command in commands.items():
                found = stage(ranks, folder / "figures", *command, *extra)
                base = bases.setdefault(label, found["cpu"])
                mode = "tensor" if extra else "data"
                print(
                    f"| {ranks} | {mode} | {label} | {found['wall']:.2f} | {found['cpu']:.2f} | "
                    f"{found['cpu'] / base:.2f} | {found['memory']:.0f} |",
                    flush=True,
                )
            check(run, folder / f"run-{counts[0]}-0")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(sys.argv[2:]))
    main()
