#!/usr/bin/env python3
"""What does `abliterate audit` cost on a wide model, and does it still find edits there?

A random Llama of heavy-tailed spectra (energies falling as rank^-power, half of the eigenbases
shared by all writers, log-normal row norms) is written in bfloat16, a shard a block. What only
reads the stream is zero and takes no disk where the file system has holes. The command line audits
it as it is and after each edit by `abliterate orthogonalize`, without record and card.

With more blocks than eight, the later ones repeat those with their rows rolled, which gives them
eigenbases of their own for little work.

    python scripts/bench_audit_wide.py --width 8192 --blocks 8 --work /big/disk
    python scripts/bench_audit_wide.py --width 8192 --blocks 80 --unedited --cases  # 21 GB
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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

CASES: dict[str, list[str]] = {
    "whole": [],
    "attention and MLP only": ["--components", "attention,mlp"],
    "middle third": [],
    "scale 0.5": ["--scale", "0.5"],
    "scale 0.3": ["--scale", "0.3"],
    "norm-preserving": ["--norm-preserve"],
}


def hadamard(size: int) -> Tensor:
    one = torch.ones(1, 1)
    while len(one) < size:
        one = torch.cat([torch.cat([one, one], 1), torch.cat([one, -one], 1)])
    return one / size**0.5


def rotate(columns: Tensor, signs: Tensor) -> Tensor:
    """A fixed orthogonal matrix that mixes all rows, ``[d, m]``; d is a power of two."""
    rows = len(columns)
    outer = 1 << (rows.bit_length() // 2)
    mixed = (columns * signs.unsqueeze(1)).view(outer, rows // outer, -1)
    mixed = hadamard(rows // outer) @ mixed
    return (hadamard(outer) @ mixed.reshape(outer, -1)).view(rows, -1)


def signs(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (rows,), generator=generator) * 2.0 - 1


class Writers:
    """Matrices of one model."""

    DISTINCT = 8  # blocks

    def __init__(self, width: int, power: float, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.width = width
        self.energies = torch.arange(1, width + 1) ** (-power / 2)
        self.shared = signs(width, self.generator)
        self.spread = torch.exp(0.3 * torch.randn(width, generator=self.generator))
        self.drawn: list[tuple[Tensor, Tensor]] = []

    def block(self, number: int, ffn: int) -> tuple[Tensor, Tensor]:
        """What the attention and the MLP of a block write with."""
        if number < self.DISTINCT:
            self.drawn.append((self.draw(self.width), self.draw(ffn)))
            return self.drawn[number]
        shift = 101 * number
        attention, mlp = self.drawn[number % self.DISTINCT]
        return attention.roll(shift, 0), mlp.roll(2 * shift, 0)

    def draw(self, columns: int) -> Tensor:
        """``[width, columns]``, bfloat16."""
        matrix = torch.randn(self.width, columns, generator=self.generator)
        matrix *= self.energies.unsqueeze(1)
        own = torch.randperm(self.width, generator=self.generator)[: self.width // 2]
        matrix[own] = rotate(matrix[own], signs(self.width // 2, self.generator))
        matrix = rotate(matrix, self.shared) * self.spread.unsqueeze(1)
        return (matrix * (0.02 * self.width**0.5 / matrix.norm(dim=0).mean())).bfloat16()


def build(folder: Path, width: int, blocks: int, ffn: int, power: float) -> None:
    config = LlamaConfig(
        vocab_size=2 * width, hidden_size=width, num_hidden_layers=blocks, intermediate_size=ffn,
        num_attention_heads=width // 128, num_key_value_heads=8, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    writers = Writers(width, power, 0)
    ones = torch.ones(width, dtype=torch.bfloat16)
    head = torch.zeros(2 * width, width, dtype=torch.bfloat16)
    shards = [
        {
            "model.embed_tokens.weight": writers.draw(2 * width).T.contiguous(),
            "model.norm.weight": ones,
            "lm_head.weight": head,
        }
    ]
    index: dict[str, str] = {}
    for number in range(-1, blocks):
        tensors = shards[0]
        if number >= 0:
            name = f"model.layers.{number}"
            attention, mlp = writers.block(number, ffn)
            tensors = {
                f"{name}.self_attn.o_proj.weight": attention,
                f"{name}.mlp.down_proj.weight": mlp,
                f"{name}.input_layernorm.weight": ones,
                f"{name}.post_attention_layernorm.weight": ones.clone(),
            }
            for part, rows in (
                ("self_attn.q_proj", width), ("self_attn.k_proj", 1024),
                ("self_attn.v_proj", 1024), ("mlp.gate_proj", ffn), ("mlp.up_proj", ffn),
            ):  # fmt: skip
                tensors[f"{name}.{part}.weight"] = torch.zeros(rows, width, dtype=torch.bfloat16)
        file = f"model-{number + 2:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        dig(folder / file)
        index |= dict.fromkeys(tensors, file)
    document = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def dig(file: Path) -> None:
    """Zeros take no disk, where that can be had."""
    if shutil.which("fallocate"):
        subprocess.run(["fallocate", "--dig-holes", str(file)], check=False)


# The command line, and then its own peak memory in KiB as the last word of stderr: that of finished
# children is the largest of all so far.
COMMAND = """
import sys
from pathlib import Path
from abliterate.cli.app import main
code = main()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(status["VmHWM"].split()[0], file=sys.stderr)
sys.exit(code)
"""


def run(*arguments: object) -> tuple[subprocess.CompletedProcess[str], float]:
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 7, 8):
        sys.exit(done.stderr)
    return done, time.perf_counter() - begun


def judge(name: str, folder: Path, truth: Tensor, work: Path, device: str) -> dict[str, Any]:
    found = work / "found.safetensors"
    found.unlink(missing_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done, seconds = run("audit", folder, "--json", "-o", found, "--device", device)
    document = json.loads(done.stdout)
    cosine = None
    if found.is_file():
        vector = load_file(found)["direction"].double()
        cosine = abs(float(vector @ truth)) / float(vector.norm() * truth.norm())
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {
        "case": name, "exit": done.returncode, "verdict": document["verdict"], "cosine": cosine,
        "p_value": document["writers"]["p_value"], "style": document["style"],
        "removed": document["removed"], "detectable": document["writers"]["detectable_scale"],
        "group": document["writers"]["group"], "compared": document["writers"]["compared"],
        "set_aside": len(document["writers"]["set_aside"]), "seconds": round(seconds, 1),
        "cpu_seconds": round(
            children.ru_utime + children.ru_stime - before.ru_utime - before.ru_stime, 1
        ),
        "peak_gib": round(int(done.stderr.split()[-1]) / 2**20, 2),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=4096, help="a power of two")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--ffn", type=int, help="columns of the MLP's writer [the width]")
    parser.add_argument("--power", type=float, default=1.0)
    parser.add_argument("--work", type=Path, help="keep the unedited checkpoint here")
    parser.add_argument("--cases", nargs="*", default=["whole"], choices=list(CASES))
    parser.add_argument("--unedited", action="store_true", help="audit the unedited one too")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        name = f"wide-{given.width}-{given.blocks}-{given.power}"
        source, edited = work / name, work / f"{name}-edited-{os.getpid()}"
        if not (source / "model.safetensors.index.json").is_file():
            build(source, given.width, given.blocks, given.ffn or given.width, given.power)
        generator = torch.Generator().manual_seed(17)
        truth = torch.randn(given.width, generator=generator, dtype=torch.float64)
        vector = work / f"{name}.safetensors"
        save_file({"direction": truth}, vector)
        if given.unedited:
            judge("unedited", source, truth, work, given.device)
        for case in given.cases:
            more = CASES[case]
            if case == "middle third":
                more = ["--layers", f"{given.blocks // 3}-{given.blocks - given.blocks // 3 - 1}"]
            run("orthogonalize", source, "--direction", vector, "-o", edited, *more)
            (edited / "abliterate.json").unlink()
            (edited / "README.md").unlink()
            judge(case, edited, truth, work, given.device)
            shutil.rmtree(edited)


if __name__ == "__main__":
    main()
