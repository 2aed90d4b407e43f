#!/usr/bin/env python3
"""How fast is `abliterate orthogonalize`, next to `cp -r` of the same checkpoint?

Builds a random Llama-shaped bfloat16 checkpoint, then runs `cp -r` and the tool in turn, and prints
the ratio of their times, the throughput and the tool's peak memory. Interpreter start and imports
are not counted; the flush to disk, which `cp` leaves to the system, is part of the tool's time.

    python scripts/bench_orthogonalize.py --size 4 --shards 4 --runs 5
    python scripts/bench_orthogonalize.py --size 4 --shards 1         # one file
    python scripts/bench_orthogonalize.py --size 4 --cold             # not in the page cache
    python scripts/bench_orthogonalize.py --against 'other-tool {source} {out}'
    python scripts/bench_orthogonalize.py --embedding-only --size 8   # one huge matrix, one file

A virtual machine's host takes memory back that lies idle, and `cp`, which needs as much of it as it
copies, is then several times slower (10 s instead of 1.6 s for 4 GB, measured). So memory of the
checkpoint's size is touched and freed right before each run: `cp` is measured at its best.

The huge matrix is a tied embedding that is edited together with the head (--tied-embeddings share),
so that the tool writes as many bytes as `cp`; untied, it would have to write them twice.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_HIDDEN, _INNER, _VOCABULARY = 4096, 14336, 32000
# Runs in an interpreter of its own: imports first, then the clock and the memory's high-water mark.
_TOOL = """
import json, sys, time
from pathlib import Path
import abliterate.editing.orthogonalize, transformers, torch
from abliterate.direction_loading import load_direction
from abliterate.editing.options import EditOptions
from transformers import AutoModelForCausalLM, LlamaForCausalLM

def status(key):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024

source, direction, out, jobs, tied = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
begun = time.perf_counter()
options = EditOptions(jobs=int(jobs) or None, tied_embeddings=tied)
abliterate.orthogonalize(source, load_direction(direction), out, options=options)
print(json.dumps({"seconds": time.perf_counter() - begun, "memory": status("VmHWM") - before}))
"""


def tensors(size: int, embedding_only: bool) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of a Llama of about ``size`` bytes, in the order of its forward pass."""
    width = 2 * _HIDDEN
    if embedding_only:
        yield "model.embed_tokens.weight", [size // width, _HIDDEN]
        layers, inner = 1, 256
    else:
        inner = _INNER
        block = width * (2 * _HIDDEN + 2 * _HIDDEN // 4 + 3 * inner)
        layers = max(1, round((size - 2 * width * _VOCABULARY) / block))
        yield "model.embed_tokens.weight", [_VOCABULARY, _HIDDEN]
    for layer in range(layers):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", [_HIDDEN]
        yield f"{name}.mlp.down_proj.weight", [_HIDDEN, inner]
        yield f"{name}.mlp.gate_proj.weight", [inner, _HIDDEN]
        yield f"{name}.mlp.up_proj.weight", [inner, _HIDDEN]
        yield f"{name}.post_attention_layernorm.weight", [_HIDDEN]
        yield f"{name}.self_attn.k_proj.weight", [_HIDDEN // 4, _HIDDEN]
        yield f"{name}.self_attn.o_proj.weight", [_HIDDEN, _HIDDEN]
        yield f"{name}.self_attn.q_proj.weight", [_HIDDEN, _HIDDEN]
        yield f"{name}.self_attn.v_proj.weight", [_HIDDEN // 4, _HIDDEN]
    yield "model.norm.weight", [_HIDDEN]
    if not embedding_only:
        yield "lm_head.weight", [_VOCABULARY, _HIDDEN]


def build(folder: Path, size: int, shards: int, embedding_only: bool) -> int:
    """Write the checkpoint; returns its bytes."""
    import torch

    shapes = list(tensors(size, embedding_only))
    total = sum(_bytes(shape) for _, shape in shapes)
    groups: list[list[tuple[str, list[int]]]] = [[]]
    for name, shape in shapes:
        if sum(_bytes(s) for _, s in groups[-1]) >= total / shards:
            groups.append([])
        groups[-1].append((name, shape))
    folder.mkdir(parents=True)
    # 64 MiB of random weights, over and over.
    noise = (torch.randn(1 << 25) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().data
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, end = {}, 0
        for name, shape in group:
            span = [end, end + _bytes(shape)]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": span}
            end, weight_map[name] = span[1], file
        raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            for position in range(0, end, len(noise)):
                out.write(noise[: end - position])
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = dict(shapes)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": _HIDDEN,
        "intermediate_size": found["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("o_proj.weight") for name in found),
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": found["model.embed_tokens.weight"][0],
        "tie_word_embeddings": embedding_only,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def _bytes(shape: list[int]) -> int:
    size = 2
    for count in shape:
        size *= count
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=4, help="GB (10^9 bytes)")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=0, help="as the tool's; 0: all cores")
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache")
    parser.add_argument("--against", help="command to compare; {source} and {out} are filled in")
    parser.add_argument("--embedding-only", action="store_true", help="one matrix of that size")
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-", dir=options.work))
    try:
        bench(options, work)
    finally:
        shutil.rmtree(work)


def bench(options: argparse.Namespace, work: Path) -> None:
    import torch
    from safetensors.torch import save_file

    if options.embedding_only:
        options.shards = 1
    source, direction = work / "source", work / "direction.safetensors"
    size = build(source, int(options.size * 1e9), options.shards, options.embedding_only)
    save_file({"direction": torch.randn(_HIDDEN, dtype=torch.float64)}, direction)

    memory_size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def prepare() -> None:
        """The same for all, right before the clock starts."""
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        for path in source.iterdir():
            if options.cold:
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                subprocess.run(["cat", str(path)], check=True, stdout=subprocess.DEVNULL)
        torch.ones(min(size, memory_size // 3), dtype=torch.uint8)

    def command(*words: str) -> Callable[[], float]:
        def run() -> float:
            prepare()
            begun = time.perf_counter()
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - begun

        return run

    def tool() -> float:
        tied = "share" if options.embedding_only else "untie"
        arguments = [str(source), str(direction), str(out), str(options.jobs), tied]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(
            [sys.executable, "-c", _TOOL, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()  # it is ready
            prepare()
            process.stdin.write("go\n")
            process.stdin.flush()
            result = json.loads(process.stdout.readline())
        memory.append(result["memory"])
        return float(result["seconds"])

    out, memory = work / "out", []
    contenders = {
        "cp -r": command("cp", "-r", str(source), str(out)),
        "cp -r; sync": command(
            "sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(source), str(out)
        ),
        "abliterate": tool,
    }
    if options.against:
        words = shlex.split(options.against.format(source=source, out=out))
        contenders["against"] = command(*words)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    contenders["cp -r"]()  # not counted: the first to touch memory and disk pays for all
    names = list(contenders)
    for run in range(options.runs):
        for name in names[run % len(names) :] + names[: run % len(names)]:
            seconds[name].append(contenders[name]())
        last = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
        print(f"run {run + 1}: {last}", file=sys.stderr, flush=True)
    base = statistics.median(seconds["cp -r"])
    cache = "cold" if options.cold else "warm"
    what = "one embedding" if options.embedding_only else "a Llama"
    shape = f"{size / 1e9:.2f} GB in {options.shards} shard{'s' * (options.shards > 1)}"
    print(f"{what}: {shape}, {cache} cache, {os.cpu_count()} cores")
    for name, values in seconds.items():
        middle = statistics.median(values)
        each = statistics.median(v / c for v, c in zip(values, seconds["cp -r"], strict=True))
        print(
            f"{name:12} median {middle:6.2f} s  (min {min(values):.2f}, max {max(values):.2f})  "
            f"{size / middle / 1e9:5.2f} GB/s  {middle / base:4.2f} x cp -r "
            f"({each:4.2f} x, run by run)"
        )
    print(f"peak memory of abliterate beyond its start: {max(memory) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
