#!/usr/bin/env python3
"""Are the estimates of `abliterate plan` right? Extraction, estimated and then measured.

    python scripts/check_plan.py [--layers 8] [--prompts 128]

Random checkpoints (dense, and a mixture of experts), each extracted from in memory and streamed,
in processes of their own; prints estimate, measurement and ratio of peak memory and time. The
speeds of disk and matrix product are measured just before, under whatever load the machine has.

    python scripts/check_plan.py --stages [--layers 8] [--width 512]

Every stage as a user starts it, on a dense checkpoint with the demo model's tokenizer: `plan` for
the same prompts, then extract, select (exhaustive, as it estimates), orthogonalize, verify
--forward and evaluate, each without what Python and the libraries take to start. Random weights
end no answer, so each has all its tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from bench_offload import _POSITIONS, build, build_tiny, prompts
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from abliterate import load_prompts
from abliterate.capacity import machine_benchmark, model_shape, resource_estimate
from abliterate.models.loading import Checkpoint, load_config
from abliterate.prompts.chat_template import ChatFormat, encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--stages", action="store_true")
    args = parser.parse_args()
    if args.stages:
        all_stages(args)
        return
    print(f"{args.prompts} prompts, {torch.get_num_threads()} threads, load "
          f"{os.getloadavg()[0]:.1f}\n")  # fmt: skip
    print("| model | mode | memory estimated GB | measured | ratio | seconds estimated | measured "
          "| ratio |")  # fmt: skip
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for args.dense in (True, False):
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "model"
            folder.mkdir()
            build(folder, args)
            build_tiny(folder, args)
            config = load_config(Checkpoint(str(folder), folder))
            shape = model_shape.shape_of(config, torch.float32)
            for mode in ("memory", "stream"):
                row(folder, args, mode, shape)


_PROMPTS, _TEST, _ANSWER = 24, resource_estimate.N_TEST, 32


def all_stages(args: argparse.Namespace) -> None:
    """One line a stage."""
    with tempfile.TemporaryDirectory() as work:
        # What a stage takes on a model of no size is its start, and no part of the estimate.
        sizes = {"none": (3, 64), "whole": (args.layers, args.width)}
        folders = {size: Path(work, size) for size in sizes}
        for size, (layers, width) in sizes.items():
            random_checkpoint(folders[size] / "model", layers, width)
        few, model = str(_PROMPTS), folders["whole"] / "model"
        planned = output("plan", str(model), "--n-train", few, "--n-val", few, "--tokens",
                         str(mean_tokens(model)), "--positions", "5", "--answer-tokens",
                         str(_ANSWER), "--json")  # fmt: skip
        expected = {stage["name"]: stage for stage in json.loads(planned)["stages"]}
        print(f"{args.layers} layers of width {args.width}, {torch.get_num_threads()} threads, "
              f"load {os.getloadavg()[0]:.1f}; without what each stage takes on a model of no "
              "size\n")  # fmt: skip
        print("| stage | seconds estimated | measured | ratio | CPU seconds |")
        print("|---|---:|---:|---:|---:|")
        for name, command in stages(folders["whole"]).items():
            start, whole = timed(*stages(folders["none"])[name]), timed(*command)
            took, worked = (max(all - begun, 1e-3) for all, begun in zip(whole, start, strict=True))
            seconds = expected[name]["seconds"]
            print(f"| {name} | {seconds:.1f} | {took:.1f} | {seconds / took:.2f} | {worked:.1f} |",
                  flush=True)  # fmt: skip


def random_checkpoint(folder: Path, layers: int, width: int) -> None:
    """A dense one with the demo model's tokenizer."""
    demo = Path(__file__).resolve().parents[1] / "data/demo-model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=AutoConfig.from_pretrained(demo).vocab_size, hidden_size=width,
        num_hidden_layers=layers, intermediate_size=4 * width, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256), head_dim=64, dtype="float32",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / name, folder)


def mean_tokens(model: Path) -> int:
    """Of the prompts that the stages take."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [p.text for kind in ("harmful", "harmless")
             for p in load_prompts(kind, "val", _PROMPTS)]  # fmt: skip
    return round(sum(map(len, encode(tokenizer, texts, ChatFormat()))) / len(texts))


def stages(folder: Path) -> dict[str, list[str]]:
    """The commands, by the names that ``plan`` has for them."""
    model, run, edited = (str(folder / name) for name in ("model", "run", "edited"))
    few = str(_PROMPTS)
    return {
        "extract": ["extract", model, "-o", run, "--n-train", few, "--no-filter",
                    "--refusal-token", "I"],
        "select": ["select", run, "--n-val", few, "--search", "exhaustive",
                   "--kl-threshold", "1e9", "--induce-threshold", "-1e9", "--no-filter"],
        "orthogonalize": ["orthogonalize", model, "--direction", run, "-o", edited],
        "verify --forward": ["verify", edited, "--direction", run, "--forward"],
        "evaluate": ["evaluate", model, "--direction", run, "--n-test", str(_TEST),
                     "--max-new-tokens", str(_ANSWER)],
    }  # fmt: skip


def timed(*arguments: str) -> tuple[float, float]:
    """Seconds that a command of ours takes, and CPU seconds, its children's too."""
    started, before = time.perf_counter(), os.times()
    output(*arguments)
    after = os.times()
    worked = after.children_user - before.children_user
    worked += after.children_system - before.children_system
    return time.perf_counter() - started, worked


def output(*arguments: str) -> str:
    """What a command of ours prints."""
    command = [sys.executable, "-m", "abliterate", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    return done.stdout


def row(folder: Path, args: argparse.Namespace, mode: str, shape: model_shape.Shape) -> None:
    lengths = [len(ids) for ids in prompts(args.prompts)]
    work = resource_estimate.Workload(
        n_train=args.prompts // 2,
        tokens=round(sum(lengths) / len(lengths)),
        positions=len(_POSITIONS),
        activation_memory=1 << 30,
        libraries=psutil.Process().memory_info().rss,
    )
    machine = resource_estimate.Machine(
        1 << 40 if mode == "memory" else 1,
        0,
        machine_benchmark.disk_speed(folder),
        machine_benchmark.layer_speed(shape.width, torch.float32, torch.device("cpu")),
        machine_benchmark.copy_speed(),
    )
    expected = resource_estimate.estimate(shape, machine, work)[0]
    for path in folder.glob("*.safetensors"):  # cold, as the estimate assumes
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    script = Path(__file__).with_name("bench_offload.py")
    command = [sys.executable, str(script), "--child", mode, str(folder), str(args.prompts), "auto",
               str(1 << 30)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    got = json.loads(done.stdout.splitlines()[-1])
    seconds = got["open"] + got["extract"]
    assert expected.seconds is not None
    print(f"| {'dense' if args.dense else 'experts'} | {expected.mode} | "
          f"{expected.memory / 1e9:.2f} | {got['peak'] / 1e9:.2f} | "
          f"{expected.memory / got['peak']:.2f} | {expected.seconds:.1f} | {seconds:.1f} | "
          f"{expected.seconds / seconds:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
