#!/usr/bin/env python3
"""How often does `abliterate audit` find an edit, and how often does it claim one wrongly?

Part 1, recall: small models of eight architectures are trained here for a few minutes in total on
the bytes of this repository's prose; with the demo model and three larger random models of
heavy-tailed spectra they are edited in every way of the table, and each edited checkpoint on disk
is audited by the function that the command line calls, without a base, after its record and card
are deleted. Part 2, false positives: unedited checkpoints, trained ones at several stages and
random ones of varied architecture, width, depth, spectrum, dead and pruned channels; and the models
after changes that are no edits (uniform decay, merged rank-1 LoRAs), with and without their bases;
and what training made of each stage of a trained model, held against that stage.

    python scripts/bench_audit.py --work /tmp/audit-bench      # all: 8 minutes of a core + training
    python scripts/bench_audit.py --steps 40 --clean 20        # a first look
    python scripts/bench_audit.py --skip-recall --also MODEL   # an unedited checkpoint of your own
    python scripts/bench_audit.py --skip-recall --rows FILE    # a stopped run goes on where it was
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from audit_models import (
    ROOT,
    Shape,
    build,
    corpus,
    decay,
    difference_of_means,
    merge_rank_one,
    random_checkpoints,
    shape_weights,
    train,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.auditing import component_pools, soft_null_space
from abliterate.auditing.report import audit
from abliterate.editing.edit_plan import make_plan
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalize import orthogonalize
from abliterate.models.loading import find_checkpoint

WEIGHTS = "model.safetensors"
TRAINED = ("llama", "gpt2", "gemma2", "qwen2", "qwen3_moe", "gpt_neox", "olmo2", "mamba")
TIED = {"gpt2", "gemma2", "qwen2", "mamba"}
HEAVY = {
    "llama, power 1, d 256, 12 blocks": ("llama", 256, 12, Shape(power=1.0, shared=0.3)),
    "mistral, power 2, d 192, 8 blocks": ("mistral", 192, 8, Shape(power=2.0, shared=0.5)),
    "qwen3, power 1.5, d 384, 10 blocks": ("qwen3", 384, 10, Shape(1.5, 0.6, rows=0.6)),
}


def options(**given: Any) -> Callable[[Path, Tensor, Path], None]:
    """An edit by this package."""

    def edit(source: Path, direction: Tensor, out: Path) -> None:
        orthogonalize(str(source), direction, out, options=EditOptions(**given))

    return edit


def middle_third(source: Path, direction: Tensor, out: Path) -> None:
    plan = make_plan(find_checkpoint(str(source)), direction)
    depth = 1 + max(edit.layer for edit in plan.edits if edit.layer is not None)
    first, last = depth // 3, depth - depth // 3 - 1
    options(layers=f"{first}-{last}")(source, direction, out)


def change(folder: Path, how: Callable[[str, Tensor], Tensor]) -> None:
    tensors = {name: how(name, t) for name, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def stored_as(dtype: torch.dtype) -> Callable[[Path, Tensor, Path], None]:
    """The source stored in another dtype, then edited in it."""

    def edit(source: Path, direction: Tensor, out: Path) -> None:
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            copy = Path(folder) / "copy"
            shutil.copytree(source, copy)
            change(copy, lambda _, t: t.to(dtype))
            orthogonalize(str(copy), direction, out)

    return edit


def fp8(source: Path, direction: Tensor, out: Path) -> None:
    """Blocks' matrices in float8 with a scale for each 64 x 64, then edited and requantized."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(source, copy)
        tensors: dict[str, Tensor] = {}
        for name, value in load_file(copy / WEIGHTS).items():
            tensors[name] = value.to(torch.bfloat16)
            inside = any(part.isdigit() for part in name.split("."))
            matrix = value.ndim == 2 and name.endswith("weight") and min(value.shape) >= 64
            if matrix and inside:
                rows, columns = value.shape
                pad = torch.nn.functional.pad(value.float(), (0, -columns % 64, 0, -rows % 64))
                tiles = pad.view(len(pad) // 64, 64, pad.shape[1] // 64, 64)
                scales = tiles.abs().amax((1, 3)).clamp(min=1e-12) / 448
                wide = scales.repeat_interleave(64, 0)[:rows].repeat_interleave(64, 1)[:, :columns]
                tensors[name] = (value.float() / wide).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = scales
        if not any(name.endswith("_scale_inv") for name in tensors):
            raise LookupError("no matrix that FP8 checkpoints would store in blocks")
        save_file(tensors, copy / WEIGHTS, {"format": "pt"})
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 64]}
        (copy / "config.json").write_text(json.dumps(config))
        orthogonalize(str(copy), direction, out, options=EditOptions(quantized="requantize"))


def lora(source: Path, direction: Tensor, out: Path) -> None:
    """A rank-1 adapter on the blocks' matrices, in bfloat16, merged into bfloat16 weights."""
    shutil.copytree(source, out)
    plan = make_plan(find_checkpoint(str(source)), direction)
    edits = {e.name: e for e in plan.edits if e.layer is not None}

    def merge(name: str, value: Tensor) -> Tensor:
        base = value.to(torch.bfloat16)
        if name not in edits or value.ndim < 2:
            return base
        up = edits[name].basis[0].to(torch.bfloat16)
        moved = base.movedim(edits[name].axis, -1).float()
        down = (moved @ edits[name].basis[0].float()).to(torch.bfloat16)
        merged = (moved - down.float().unsqueeze(-1) * up.float()).to(torch.bfloat16)
        return merged.movedim(-1, edits[name].axis).contiguous()

    change(out, merge)


def tuned(relative: float) -> Callable[[Path, Tensor, Path], None]:
    """The whole edit, then noise of this size relative to each tensor's own."""

    def edit(source: Path, direction: Tensor, out: Path) -> None:
        orthogonalize(str(source), direction, out)
        generator = torch.Generator().manual_seed(3)

        def noisy(_: str, t: Tensor) -> Tensor:
            wide = t.float()
            noise = torch.randn(t.shape, generator=generator) * wide.square().mean().sqrt()
            return (wide + relative * noise).to(t.dtype)

        change(out, noisy)

    return edit


CASES: Mapping[str, Callable[[Path, Tensor, Path], None]] = {
    "our edit": options(),
    "attention and MLP only": options(components="attention,mlp"),
    "middle third of layers": middle_third,
    "scale 0.8": options(scale=0.8),
    "scale 0.5": options(scale=0.5),
    "scale 0.3": options(scale=0.3),
    "norm-preserving rows": options(norm_preserve=True),
    "rank-1 LoRA merged": lora,
    "bfloat16": stored_as(torch.bfloat16),
    "float16": stored_as(torch.float16),
    "FP8": fp8,
    "then noise 1e-4": tuned(1e-4),
    "then noise 1e-3": tuned(1e-3),
}


Model = tuple[str, Path, Tensor, list[Path]]


def trained(work: Path, steps: int, wanted: Callable[[str], bool]) -> Iterator[Model]:
    """Name, folder, the method's own direction and earlier stages of each trained model."""
    data = corpus()
    for kind in filter(wanted, TRAINED):
        final, note = work / f"trained-{kind}-4", work / f"trained-{kind}.pt"
        stages = [work / f"trained-{kind}-{index}" for index in (1, 2, 3, 4)]
        if not note.is_file():
            model = build(kind, 128, 6, seed=0, tied=kind in TIED)
            for index, _ in enumerate(train(model, data, steps, seed=0)):
                model.save_pretrained(stages[index])
            torch.save(difference_of_means(model), note)
        yield kind, final, torch.load(note, weights_only=True), stages[:3]


def models(work: Path, steps: int, only: Sequence[str]) -> Iterator[Model]:
    """All models whose name begins with one of ``only``; all if that is empty."""

    def wanted(name: str) -> bool:
        return not only or name.startswith(tuple(only))

    yield from trained(work, steps, wanted)
    demo = work / "demo"
    if wanted("demo model"):
        shutil.copytree(ROOT / "data" / "demo-model", demo, dirs_exist_ok=True)
        yield "demo model", demo, demo_direction(work), []
    for name, (kind, width, depth, shape) in HEAVY.items():
        if not wanted(name):
            continue
        folder = work / f"heavy-{kind}-{width}"
        if not folder.is_dir():
            shape_weights(build(kind, width, depth, seed=2), shape, folder, seed=2)
        yield (
            name,
            folder,
            torch.ones(width, dtype=torch.float64),
            [],
        )  # has no direction of its own


def demo_direction(work: Path) -> Tensor:
    """The refusal direction of the demo model, by the package's own extract and select."""
    from abliterate import extract, load_model, load_prompts, select

    note = work / "demo.pt"
    if not note.is_file():
        loaded = load_model(str(ROOT / "data" / "demo-model"))
        prompts = {
            (kind, split): load_prompts(kind, split, 32)
            for kind in ("harmful", "harmless")
            for split in ("train", "val")
        }
        found = extract(loaded, prompts["harmful", "train"], prompts["harmless", "train"])
        chosen = select(loaded, found, prompts["harmful", "val"], prompts["harmless", "val"])
        torch.save(chosen.direction.vector.clone(), note)
    vector: Tensor = torch.load(note, weights_only=True)
    return vector


class Rows:
    """The audits, each a line of a file as soon as it is found, so that a stopped run can go on.

    A row says by which state of the audit's code it was found.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        kept = path is not None and path.is_file()
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path and kept else []
        self.held = {row["key"]: row for row in rows}
        code = hashlib.sha256()
        for file in sorted((ROOT / "src" / "abliterate" / "auditing").glob("*.py")):
            code.update(file.read_bytes())
        self.code = code.hexdigest()[:8]

    def find(self, key: str, judge: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of this key: the one that the file holds, or a new one."""
        if key not in self.held:
            row = {"key": key, "code": self.code, **judge()}
            print(json.dumps(row), file=sys.stderr, flush=True)
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            self.held[key] = row
        return self.held[key]


def recall(work: Path, steps: int, only: Sequence[str], rows: Rows) -> Iterator[dict[str, Any]]:
    for name, folder, own, _ in models(work, steps, only):
        generator = torch.Generator().manual_seed(17)
        other = torch.randn(own.shape, generator=generator, dtype=torch.float64)
        heavy = folder.name.startswith("heavy")
        for drawn, vector in (("random", other), *((("means", own),) if not heavy else ())):
            for case, edit in CASES.items():
                judge = partial(judge_edit, work, folder, vector, edit)
                try:
                    row = rows.find(f"{name}, {drawn}, {case}", judge)
                except LookupError as error:
                    print(f"{name}, {case}: not possible ({error})", file=sys.stderr)
                    continue
                yield {"model": name, "direction": drawn, "case": case, **row}


def judge_edit(
    work: Path, folder: Path, vector: Tensor, edit: Callable[[Path, Tensor, Path], None]
) -> dict[str, Any]:
    """Edit the checkpoint along the vector, and audit what comes out."""
    out = work / f"edited-{os.getpid()}"
    shutil.rmtree(out, ignore_errors=True)
    edit(folder, vector, out)
    (out / "abliterate.json").unlink(missing_ok=True)
    (out / "README.md").unlink(missing_ok=True)
    begun = time.perf_counter()
    found = audit(find_checkpoint(str(out)))
    unit = vector / vector.norm()
    cosine = None if found.direction is None else abs(float(found.direction @ unit))
    return {
        "verdict": found.verdict, "evidence": found.evidence, "writers": found.blind.verdict,
        "p_value": found.blind.p_value, "cosine": cosine, "style": found.style,
        "removed": found.removed, "biases": found.biases,
        "embeddings": found.embeddings, "seconds": time.perf_counter() - begun,
    }  # fmt: skip


#: What is done to unedited models, and is no edit: held against its own base, and without one.
BENIGN: Mapping[str, Callable[[Path], None]] = {
    "decay of 2%": lambda folder: decay(folder, 0.02),
    "decay of 20%": lambda folder: decay(folder, 0.2),
    "rank-1 LoRA on writers, size 0.02": lambda folder: merge_rank_one(folder, 0.02),
    "rank-1 LoRA on writers, size 0.2": lambda folder: merge_rank_one(folder, 0.2),
}


def judge_unedited(folder: Path, base: Path | None = None) -> dict[str, Any]:
    source = None if base is None else find_checkpoint(str(base))
    found = audit(find_checkpoint(str(folder)), source)
    sides = (found.blind, found.readers)
    return {
        "verdict": found.verdict, "reason": found.reason,
        "p_value": min(side.p_value for side in sides),
        "p_values": [side.p_value for side in sides],
        "detectable": [side.detectable for side in sides],
        "groups": [[g.ratio, g.agreement] for side in sides for g in side.gaps.values()],
        "set_aside": [one.reason for side in sides for one in side.set_aside],
        "projected": 0 if found.comparison is None else len(found.comparison.projected),
    }  # fmt: skip


def judge_benign(work: Path, folder: Path, case: str, with_base: bool) -> dict[str, Any]:
    """Change the checkpoint in a way that is no edit, and audit that."""
    changed = work / f"changed-{os.getpid()}"
    shutil.rmtree(changed, ignore_errors=True)
    shutil.copytree(folder, changed)
    BENIGN[case](changed)
    try:
        return judge_unedited(changed, folder if with_base else None)
    finally:
        shutil.rmtree(changed, ignore_errors=True)


def false_positives(work: Path, given: argparse.Namespace, rows: Rows) -> Iterator[dict[str, Any]]:
    """Audits of unedited checkpoints: ``also`` are some of one's own (pretrained ones, say)."""
    unedited = [(folder.name, folder) for folder in given.also[: given.clean]]
    for name, folder, _, stages in models(work, given.steps, given.only):
        unedited += [(f"{name}: {stage.name}", stage) for stage in (*stages, folder)]
    for name, folder in unedited[: given.clean]:
        yield rows.find(name, partial(judge_unedited, folder))
    left = max(0, given.clean - len(unedited))
    indices = [*range(given.first, left), *range(min(given.first, left))]
    for name, make in random_checkpoints(work / "clean", indices):
        yield rows.find(name, lambda make=make: judge_unedited(make()))
    for name, folder, _, stages in models(work, given.steps, given.only):
        kept = [*stages, folder]
        for base, later in [*pairwise(kept), *([(kept[0], kept[-1])] if len(kept) > 2 else [])]:
            how = f"{name}: {later.name}, trained on from {base.name}, with its base"
            yield rows.find(how, partial(judge_unedited, later, base))
        for case in BENIGN:
            for with_base, how in ((True, ", with its base"), (False, "")):
                judge = partial(judge_benign, work, folder, case, with_base)
                yield rows.find(f"{name}, {case}{how}", judge)


def report(found: list[dict[str, Any]], clean: list[dict[str, Any]]) -> None:
    """Both tables as Markdown."""
    by_case: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        by_case[row["case"]].append(row)
    if by_case:
        print("| edit | audits | found | of the writers alone | cosine: median | least |")
        print("|---|---|---|---|---|---|")
    for case, rows in by_case.items():
        hits = [row for row in rows if row["verdict"] == "edited"]
        alone = sum(row["writers"] == "edited" for row in rows)
        cosines = sorted(row["cosine"] for row in hits)
        least = f"{cosines[len(cosines) // 2]:.4f} | {cosines[0]:.4f}" if cosines else "- | -"
        print(
            f"| {case} | {len(rows)} | {len(hits) / len(rows):.0%} | {alone / len(rows):.0%} "
            f"| {least} |"
        )
    names = list(dict.fromkeys((row["model"], row["direction"]) for row in found))
    if names:
        print("\nFound (o), not found (.), undecided (?), by model and direction:\n")
        print("| model | direction | " + " | ".join(CASES) + " |")
        print("|---|---|" + "---|" * len(CASES))
    for name, drawn in names:
        own = {r["case"]: r for r in found if (r["model"], r["direction"]) == (name, drawn)}
        marks = [
            {"edited": "o", "clean": ".", "undecided": "?"}[own[c]["verdict"]] if c in own else " "
            for c in CASES
        ]
        print(f"| {name} | {drawn} | " + " | ".join(marks) + " |")
    if clean:
        verdicts = Counter(row["verdict"] for row in clean)
        print(f"\nUnedited: {len(clean)} checkpoints: {dict(verdicts)}")
        print(f"by the state of the audit's code: {dict(Counter(row['code'] for row in clean))}")
        claimed = [row["key"] for row in clean if row["verdict"] == "edited" or row["projected"]]
        print(f"claimed wrongly: {len(claimed)} {claimed}")
        print(f"smallest p-value: {min(row['p_value'] for row in clean):.1e}")
        groups = [g for row in clean for g in row["groups"]]
        for bound in (0.5, 0.75, 1.0, 1.25, 1.5):
            share = sum(ratio > bound for ratio, _ in groups) / max(1, len(groups))
            print(f"gap ratio > {bound}: {share:.2%} of {len(groups)} groups")
        print(f"largest ratio {max(g[0] for g in groups):.2f}, "
              f"largest agreement {max(g[1] for g in groups):.3f}")  # fmt: skip
        aside = Counter(reason for row in clean for reason in row["set_aside"])
        print(f"set aside: {dict(aside)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="keep the models here")
    parser.add_argument("--steps", type=int, default=240, help="of training")
    parser.add_argument("--clean", type=int, default=300, help="unedited checkpoints")
    parser.add_argument("--skip-recall", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], help="models whose name begins so")
    parser.add_argument(
        "--wide", action="store_true", help="compute as for thousands of channels: float32, pooled"
    )
    parser.add_argument(
        "--also", type=Path, nargs="*", default=[], help="unedited checkpoints of your own"
    )
    parser.add_argument(
        "--rows", type=Path, help="each audit as a line of JSON; those it holds are not run again"
    )
    parser.add_argument(
        "--first", type=int, default=0, help="begin with this random model; those before it follow"
    )
    parser.add_argument("--out", type=Path, help="all figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.wide:
        soft_null_space.WIDE, component_pools._MOST_BYTES = 0, 0.0
    begun = time.process_time()
    found: list[dict[str, Any]] = []
    clean: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the table of what was done by then
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        work, rows = given.work or Path(folder), Rows(given.rows)
        work.mkdir(parents=True, exist_ok=True)
        if not given.skip_recall:
            found.extend(recall(work, given.steps, given.only, rows))
        if given.clean:
            clean.extend(false_positives(work, given, rows))
    if given.out:
        given.out.write_text(json.dumps({"recall": found, "clean": clean}, indent=1))
    report(found, clean)
    print(f"\n{(time.process_time() - begun) / 60:.1f} minutes of one core's time")


if __name__ == "__main__":
    main()
