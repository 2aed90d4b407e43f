#!/usr/bin/env python3
"""Are the estimates of `abliterate plan` right? Extraction, estimated and then measured.

    python scripts/check_plan.py [--layers 8] [--prompts 128]

Random checkpoints (dense, and a mixture of experts), each extracted from in memory and streamed, in
processes of their own; prints estimate, measurement and ratio of peak memory and time. The speeds
of disk and matrix product are measured just before, under whatever load the machine has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from bench_offload import _POSITIONS, build, build_tiny, prompts

from abliterate.capacity import machine_benchmark, resource_estimate
from abliterate.models.loading import Checkpoint, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=128)
    args = parser.parse_args()
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
            shape = resource_estimate.shape_of(config, torch.float32)
            for mode in ("memory", "stream"):
                row(folder, args, mode, shape)


def row(folder: Path, args: argparse.Namespace, mode: str, shape: resource_estimate.Shape) -> None:
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
