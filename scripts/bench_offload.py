#!/usr/bin/env python3
"""Extraction with `--offload` against `accelerate`'s disk offload, under one memory limit.

Builds a random checkpoint larger than the limit, then extracts means from the same prompts in two
ways, each in a process of its own inside a control group (root; v1 or v2) whose memory, page cache
included, is limited: this package's streaming, and `from_pretrained(device_map="auto",
offload_folder=...)` with the same hooks, batch after batch. The page cache is dropped before each,
and a tiny checkpoint goes first, so that reading the libraries does not count.
Without the right to make a control group there is no limit, and the script says so.

    python scripts/bench_offload.py                              # a mixture of experts, 256 prompts
    python scripts/bench_offload.py --dense --layers 24          # every weight computes
    python scripts/bench_offload.py --batch-sizes 8 32 auto
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parents[1]
_VOCABULARY = 32000
_POSITIONS = [-3, -2, -1]


def matrices(args: argparse.Namespace) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes, shard by shard."""
    w = args.width
    inner = w if not args.dense else 4 * w
    for at in range(args.layers):
        here = f"model.layers.{at}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{here}.input_layernorm.weight": (w,),
            f"{here}.post_attention_layernorm.weight": (w,),
            **{f"{here}.self_attn.{p}_proj.weight": (w, w) for p in "qo"},
            **{f"{here}.self_attn.{p}_proj.weight": (w // 4, w) for p in "kv"},
        }
        if not args.dense:
            shapes |= {f"{here}.self_attn.{p}_norm.weight": (64,) for p in "qk"}
            shapes[f"{here}.mlp.gate.weight"] = (args.experts, w)
        experts = [".mlp"] if args.dense else [f".mlp.experts.{e}" for e in range(args.experts)]
        for own in experts:
            shapes[f"{here}{own}.gate_proj.weight"] = (inner, w)
            shapes[f"{here}{own}.up_proj.weight"] = (inner, w)
            shapes[f"{here}{own}.down_proj.weight"] = (w, inner)
        yield shapes
    yield {
        "model.embed_tokens.weight": (_VOCABULARY, w),
        "model.norm.weight": (w,),
        "lm_head.weight": (_VOCABULARY, w),
    }


def build(folder: Path, args: argparse.Namespace) -> int:
    """Write the checkpoint; returns its bytes."""
    common = {
        "vocab_size": _VOCABULARY, "hidden_size": args.width, "num_hidden_layers": args.layers,
        "num_attention_heads": args.width // 64,
        "num_key_value_heads": args.width // 256, "head_dim": 64,
        "max_position_embeddings": 512, "tie_word_embeddings": False, "dtype": "float32",
        "pad_token_id": 0,
    }  # fmt: skip
    if args.dense:
        config = LlamaConfig(
            intermediate_size=4 * args.width, architectures=["LlamaForCausalLM"], **common
        )
    else:
        config = Qwen3MoeConfig(
            moe_intermediate_size=args.width, num_experts=args.experts, num_experts_per_tok=2,
            architectures=["Qwen3MoeForCausalLM"], **common,
        )  # fmt: skip
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    noise = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0))
    for number, shapes in enumerate(matrices(args)):
        tensors = {}
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            at = hash_of(name) % (len(noise) - size)
            values = noise[at : at + size].reshape(shape)
            tensors[name] = values / shape[-1] ** 0.5 if len(shape) > 1 else torch.ones(shape)
        file = f"model-{number:05}.safetensors"
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def build_tiny(folder: Path, args: argparse.Namespace) -> None:
    """A checkpoint of the same kind beside ``folder``, to warm up with."""
    tiny = folder.with_name("tiny")
    tiny.mkdir()
    build(tiny, argparse.Namespace(layers=2, experts=4, width=256, dense=args.dense))


def hash_of(name: str) -> int:
    return sum((i + 1) * ord(c) * 7919 for i, c in enumerate(name))


def prompts(n: int) -> list[list[int]]:
    """Random token ids, as long as chat-formatted instructions are."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(14, 40, (n,), generator=generator).tolist()
    return [torch.randint(3, _VOCABULARY, (k,), generator=generator).tolist() for k in lengths]


@contextmanager
def limited(limit: int) -> Iterator[Path | None]:
    """A control group with a memory limit, or None where none can be made."""
    v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    group = Path("/sys/fs/cgroup" if v2 else "/sys/fs/cgroup/memory") / f"abliterate-{os.getpid()}"
    try:
        group.mkdir()
        name = "memory.max" if v2 else "memory.limit_in_bytes"
        (group / name).write_text(str(limit))
    except OSError as error:
        print(f"no control group can be made ({error}): nothing limits memory\n")
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def child(mode: str, folder: Path, n: int, batch: str, budget: int) -> None:
    """One measured run, in a process of its own.

    A tiny checkpoint of the same kind goes first: what is read of the libraries when they are first
    used is no weight.
    """
    sys.path.insert(0, str(ROOT / "src"))
    size: int | str = batch if batch == "auto" else int(batch)
    ids = prompts(n)
    with tempfile.TemporaryDirectory(dir=folder.parent) as spare:
        extract(mode, folder.with_name("tiny"), ids[:8], size, budget, spare)
    before = read_so_far()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder.parent) as spare:
        opened, mean = extract(mode, folder, ids, size, budget, spare)
        done = time.perf_counter()
    torch.save(mean, folder.parent / f"{mode}.pt")
    read = read_so_far() - before
    # Not getrusage: what that says starts from the parent's, which has built the checkpoint.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) << 10
    print(json.dumps({"open": opened - begun, "extract": done - opened, "peak": peak,
                      "read": read, "load": os.getloadavg()[0]}))  # fmt: skip


def extract(
    mode: str, folder: Path, ids: list[list[int]], size: int | str, budget: int, spare: str
) -> tuple[float, torch.Tensor]:
    """When the model was open, and the means."""
    from abliterate.extraction import mean_activations
    from abliterate.inference.forward import stand_in
    from abliterate.models.loading import Checkpoint, load_weights
    from abliterate.offload import open_model, open_stream
    from abliterate.offload.weight_passes import look

    if mode == "stream":
        open_model.load_tokenizer = lambda *_: None  # the prompts are token ids
        loaded = open_stream(str(folder), "cpu", "float32", activation_memory=budget)
        opened = time.perf_counter()
        _, seen = look(loaded.engine.offloaded, ids, _POSITIONS, size)
        loaded.engine.offloaded.close()
        return opened, seen.mean(0, dtype=torch.float64)
    if mode == "memory":  # for scripts/check_plan.py
        model = load_weights(Checkpoint(str(folder), folder), "cpu", "float32")
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": budget}, offload_folder=spare,
            dtype=torch.float32,
        )  # fmt: skip
        stand_in(model, torch.device("cpu"), True)
    opened = time.perf_counter()
    mean, _ = mean_activations.mean_resid_pre(model, ids, _POSITIONS, batch_size=size)
    return opened, mean


def read_so_far() -> int:
    """Bytes that this process has had from the disk."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(io["read_bytes"])


def measure(mode: str, folder: Path, args: argparse.Namespace, batch: str, limit: int) -> dict:  # type: ignore[type-arg]
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("the page cache cannot be dropped: it may be warm")
    budget = limit // 8 if mode == "stream" else limit - args.libraries
    command = [sys.executable, __file__, "--child", mode, str(folder), str(args.prompts), batch,
               str(budget)]  # fmt: skip
    with limited(limit) as group:

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)
    if done.returncode:
        sys.exit(f"{mode} fails ({done.returncode}): {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--width", type=int, default=512, help="d_model, a multiple of 256")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--share", type=float, default=0.57, help="limit over checkpoint size")
    parser.add_argument("--libraries", type=int, default=550 << 20, help="left to torch and co.")
    parser.add_argument("--batch-sizes", nargs="+", default=["8", "32", "auto"])
    parser.add_argument("--folder", help="where the checkpoint goes; deleted afterwards")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        folder = work / "model"
        folder.mkdir()
        size = build(folder, args)
        build_tiny(folder, args)
        limit = int(args.share * size)
        tokens = sum(map(len, prompts(args.prompts)))
        kind = "dense" if args.dense else f"{args.experts} experts, 2 used"
        print(f"{size / 1e9:.2f} GB of float32 ({args.layers} layers, {kind}), memory limit "
              f"{limit / 1e9:.2f} GB, {args.prompts} prompts of {tokens:,} tokens, "
              f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n",
              flush=True)  # fmt: skip
        print("| run | batch | open s | extract s | read, of checkpoint | peak RSS GB |")
        print("|---|---|---:|---:|---:|---:|")
        rows = []
        for mode, batch in [("stream", "auto"), *(("accelerate", b) for b in args.batch_sizes)]:
            row = measure(mode, folder, args, batch, limit)
            rows.append((mode, batch, row))
            print(f"| {'--offload' if mode == 'stream' else mode} | {batch} | {row['open']:.1f} | "
                  f"{row['extract']:.1f} | {row['read'] / size:.2f} | {row['peak'] / 1e9:.2f} |",
                  flush=True)  # fmt: skip
        base = rows[0][2]
        print()
        for _, batch, row in rows[1:]:
            print(f"batch {batch}: {row['extract'] / base['extract']:.1f}x the time of --offload")
        one, other = (torch.load(work / f"{mode}.pt") for mode in ("stream", "accelerate"))
        print(f"means differ by {float((one - other).norm() / other.norm()):.1e}")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
    else:
        main()
