"""Measure abliterate on an accelerator, each figure beside its floor in the same run.

    scripts/gpu_check.sh [--device auto] [-o FILE] [--tiny]

Builds decoder models of 0.5B and 7B shape on the device (random bfloat16 weights, the bundled
tokenizer), and prints one JSON document. Each floor is measured in the same run, in turn with what
it is the floor of, best of ``--repeats``:

- ``extract`` beside a bare forward pass over the same batches;
- ``select`` beside 1 + 3 x candidates passes over the same prompts (a pass is measured, the number
  of them is multiplied), with thresholds that a quarter and then a half of the candidates pass;
- generation with the ablation's hooks beside generation without;
- ``orthogonalize`` on the device beside a copy of the checkpoint's folder (the 0.5B shape);
- the largest memory of each beside that of the weights;
- how often the host waits for the device, by torch's own count (CUDA);
- the demo model's pipeline on the device and on the CPU: the same winner.

A part that fails says so in its place, and so does one that there is no time or memory for. Exit
code 0 if all that ran is as it should be. ``--tiny`` makes all shapes tiny, to try the script out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import math
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

import abliterate
from abliterate.checkpoints.checkpoint import find_checkpoint
from abliterate.cli.app import main as abliterate_main
from abliterate.console import log
from abliterate.editing.options import EditOptions
from abliterate.errors import one_line, speaking_of_options
from abliterate.extraction.extraction import Extraction
from abliterate.inference.answer_watch import LOOK_ACCELERATOR
from abliterate.inference.device_memory import forget_highest, highest_seen
from abliterate.inference.forward import Batch, for_each_batch, last_logits
from abliterate.inference.generation import greedy_answers
from abliterate.models.loading import LoadedModel, load_tokenizer, pick_device
from abliterate.models.model_classes import build_model
from abliterate.offload.open_model import free_memory
from abliterate.prompts.chat_template import ChatFormat, encode
from abliterate.resources import demo_model_dir
from abliterate.selection.candidate_filters import Score, Thresholds, apply_filters
from abliterate.storage.artifacts import versions

# Counts waits within its context: yields what gives their number so far by the line of code that
# waited, None where none counts.
CountWaits = Callable[[torch.device], AbstractContextManager[Callable[[], dict[str, int] | None]]]

_LONG = 20.0  # seconds after which nothing is measured once more
POSITIONS = "-5,-4,-3,-2,-1"  # as many as the template of the bundled tokenizer has
_TINY: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "0.5B (Qwen2.5-0.5B)": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "7B (Llama-2-7B)": lambda: LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    ),
}  # fmt: skip
TINY_SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny Qwen2": lambda: Qwen2Config(**_TINY, tie_word_embeddings=True),
    "tiny Llama": lambda: LlamaConfig(**_TINY, tie_word_embeddings=False),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        n_train: prompts per kind of ``extract``.
        n_val: prompts per kind of ``select``.
        n_answers: prompts that are answered.
        new_tokens: how long answers are.
        demo: options of the demo model's pipeline.
    """

    n_train: int = 128
    n_val: int = 16
    n_answers: int = 32
    new_tokens: int = 64
    demo: tuple[str, ...] = (
        "--n-train", "64", "--n-val", "16", "--n-test", "8", "--max-new-tokens", "16",
    )  # fmt: skip


_TINY_DEMO = ("--n-train", "16", "--n-val", "4", "--n-test", "1", "--positions=-1",
              "--max-new-tokens", "2", "--controls", "0")  # fmt: skip
TINY = Sizes(8, 2, 2, 3, _TINY_DEMO)


@dataclass
class Clock:
    """What is left of the time, and what did not go well.

    Attributes:
        limit: seconds for everything.
        failures: parts that failed, or found what should not be.
    """

    limit: float
    failures: list[str] = field(default_factory=list)
    _begun: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def part(self, name: str, expected: float, run: Callable[[], Any]) -> Any:
        """What ``run`` gives; why there is nothing, where it fails or time is short."""
        if self.seconds + expected > self.limit:
            return {"skipped": f"no time: {self.seconds:.0f} of {self.limit:.0f} s are gone"}
        print(f"{self.seconds:6.1f} s  {name}", file=sys.stderr, flush=True)
        try:
            return run()
        except Exception as error:  # the other parts are worth having
            self.failures.append(f"{name}: {type(error).__name__}: {one_line(error)[:300]}")
            return {"error": self.failures[-1]}


# --- measuring --------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    begun = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - begun


def in_turn(
    runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, float]:
    """The best of several times of each, one after the other, after a run that does not count.

    With no repeats that one counts, and where it took long there are no more after the next.
    """
    best = dict.fromkeys(runs, math.inf)
    begun = time.monotonic()
    for turn in range(repeats + 1):
        for name, run in runs.items():
            taken = seconds_of(run, device)
            print(f"          {taken:7.3f} s  {name}", file=sys.stderr, flush=True)
            if turn or not repeats:
                best[name] = min(best[name], taken)
        if turn and time.monotonic() - begun > _LONG:
            break
    return best


@contextlib.contextmanager
def left_out() -> Iterator[list[str]]:
    """Collects which shortcuts a search tries out and does not use, and how far off they are."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().endswith("not used") and record.getMessage() not in told:
                told.append(record.getMessage())

    level, listener = log.level, Listener()
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        yield told
    finally:
        log.removeHandler(listener)
        log.setLevel(level)


@contextlib.contextmanager
def count_cuda_waits(device: torch.device) -> Iterator[Callable[[], dict[str, int] | None]]:
    """Count by ``torch.cuda.set_sync_debug_mode``, which warns of every wait."""
    if device.type != "cuda":
        yield lambda: None
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: Counter(
                f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}"
                for one in caught
                if "synchronizing" in str(one.message)
            )
        finally:
            torch.cuda.set_sync_debug_mode(before)


# --- the parts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A random model on the device, and what is asked of it."""

    loaded: LoadedModel
    device: torch.device
    sizes: Sizes
    repeats: int
    count_waits: CountWaits

    @property
    def weights(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.loaded.model.parameters())

    def prompts(self, kind: str, split: str, count: int) -> list[Any]:
        return list(abliterate.load_prompts(kind, split, count))

    def ids(self, split: str, count: int) -> dict[str, list[list[int]]]:
        return {
            kind: [
                list(row)
                for row in encode(
                    self.loaded.tokenizer,
                    [prompt.text for prompt in self.prompts(kind, split, count)],
                    ChatFormat(),
                )
            ]
            for kind in ("harmful", "harmless")
        }

    def bare(self, rows: Sequence[Sequence[int]]) -> int:
        """Forward passes alone over the batches that the tool makes; how many they were."""
        passes = 0

        def run(batch: Batch) -> None:
            nonlocal passes
            passes += 1
            last_logits(self.loaded.model, batch)

        with torch.inference_mode():
            for_each_batch(self.loaded.model, rows, run)
        return passes

    def extraction(self, positions: str) -> Extraction:
        kinds = [self.prompts(k, "train", self.sizes.n_train) for k in ("harmful", "harmless")]
        return abliterate.extract(
            self.loaded, *kinds, positions=positions, refusal_tokens=["I"], filter=False
        )

    def extract(self) -> dict[str, Any]:
        """extract over a bare forward pass."""
        ids = self.ids("train", self.sizes.n_train)
        tokens = sum(len(row) for rows in ids.values() for row in rows)

        def bare() -> int:
            return sum(self.bare(rows) for rows in ids.values())

        def run() -> Extraction:
            return self.extraction(POSITIONS)

        passes = bare()
        best = in_turn({"floor": bare, "extract": run}, self.device, self.repeats)
        return {
            "seconds": best["extract"],
            "tokens_per_second": tokens / best["extract"],
            "floor": {
                "what": "a bare forward pass over the same batches",
                "seconds": best["floor"],
                "tokens_per_second": tokens / best["floor"],
            },
            "ratio": best["extract"] / best["floor"],
            **self._watched(run, passes, "one a batch"),
        }

    def select(self) -> dict[str, Any]:
        """select over the naive number of passes."""
        extraction = self.extraction(POSITIONS)
        val = {k: self.prompts(k, "val", self.sizes.n_val) for k in ("harmful", "harmless")}
        ids = self.ids("val", self.sizes.n_val)
        n_layers = extraction.directions.shape[1]
        n_candidates = n_layers * len(extraction.positions)

        def run(search: Any, thresholds: Thresholds) -> Any:
            return abliterate.select(
                self.loaded, extraction, val["harmful"], val["harmless"], thresholds=thresholds,
                filter=False, search=search,
            )  # fmt: skip

        with left_out() as not_used:
            passed = opened(run("exhaustive", Thresholds()).scores, n_layers)
        winners: dict[str, list[int] | None] = {}

        def search(name: str) -> None:
            winner = run(name, passed).winner
            winners[name] = None if winner is None else [winner.position, winner.layer]

        runs = {
            "harmful": lambda: self.bare(ids["harmful"]),
            "harmless": lambda: self.bare(ids["harmless"]),
            "exhaustive": lambda: search("exhaustive"),
            "staged": lambda: search("staged"),
        }
        best = in_turn(runs, self.device, self.repeats)
        naive = best["harmless"] + n_candidates * (2 * best["harmless"] + best["harmful"])
        return {
            "seconds": {name: best[name] for name in ("exhaustive", "staged")},
            "floor": {
                "what": f"1 + 3 x {n_candidates} passes over {self.sizes.n_val} prompts a kind",
                "seconds": naive,
            },
            "faster": {name: naive / best[name] for name in ("exhaustive", "staged")},
            "winner": winners,
            "not_used": not_used,
            **self._watched(lambda: search("staged"), None, "at most one a batch"),
        }

    def generate(self) -> dict[str, Any]:
        """Tokens per second with hooks over without."""
        rows = self.ids("test", self.sizes.n_answers)["harmless"]
        model = self.loaded.model
        width = model.config.hidden_size
        vector = torch.randn(width, generator=torch.Generator().manual_seed(1))
        counts: dict[str, int] = {}

        def answer(name: str) -> None:
            found = greedy_answers(self.loaded, rows, self.sizes.new_tokens)
            counts[name] = sum(map(len, found))

        def hooked() -> None:
            with abliterate.ablate(model, vector):
                answer("hooked")

        runs = {"plain": lambda: answer("plain"), "hooked": hooked}
        best = in_turn(runs, self.device, self.repeats)
        rates = {name: counts[name] / best[name] for name in runs}
        return {
            "tokens_per_second": rates["hooked"],
            "floor": {"what": "without hooks", "tokens_per_second": rates["plain"]},
            "ratio": rates["plain"] / rates["hooked"],
            **self._watched(
                hooked, self.sizes.new_tokens // LOOK_ACCELERATOR, "one in so many tokens"
            ),
        }

    def _watched(self, run: Callable[[], object], floor: int | None, what: str) -> dict[str, Any]:
        """How often the host waits in a run, and the most bytes that are taken on the device.

        None for either where it cannot be told.
        """
        module = torch.get_device_module(self.device)
        tells = hasattr(module, "max_memory_allocated")
        if tells:
            module.reset_peak_memory_stats(self.device)
            forget_highest()
        with self.count_waits(self.device) as waits:
            run()
            waited = waits()
        wait_for(self.device)
        seen = partial(highest_seen, self.device)
        # The tool's own meter resets torch's count, and remembers what it was.
        most = max(int(module.max_memory_allocated(self.device)), seen()) if tells else None
        return {
            "waits": {
                "count": None if waited is None else sum(waited.values()),
                "floor": floor,
                "what": what,
                "most": None if waited is None else dict(Counter(waited).most_common(6)),
            },
            "memory": {
                "bytes": most, "floor": {"what": "the weights", "bytes": self.weights},
            },
        }  # fmt: skip

    def orthogonalize(self, place: Path) -> dict[str, Any]:
        """orthogonalize on the device over a plain copy."""
        source = place / "source"
        need, free = 4 * self.weights, shutil.disk_usage(place).free
        if free < need:
            return {"skipped": f"{free / 1e9:.0f} GB of disk are free, {need / 1e9:.0f} are needed"}
        self.loaded.model.save_pretrained(source)
        self.loaded.tokenizer.save_pretrained(source)
        size = sum(file.stat().st_size for file in source.iterdir())
        width = self.loaded.model.config.hidden_size
        vector = torch.randn(width, generator=torch.Generator().manual_seed(2))
        direction = abliterate.Direction(vector, -1, 1)

        def copy() -> None:
            shutil.rmtree(place / "copy", ignore_errors=True)
            shutil.copytree(source, place / "copy")

        def edit(where: str) -> None:
            shutil.rmtree(place / "edited", ignore_errors=True)
            options = EditOptions(device=where)
            abliterate.orthogonalize(str(source), direction, place / "edited", options=options)

        runs = {"floor": copy, "edit": partial(edit, str(self.device)), "cpu": partial(edit, "cpu")}
        best = in_turn(runs, self.device, self.repeats)
        return {
            "seconds": best["edit"],
            "bytes_per_second": size / best["edit"],
            "floor": {"what": "a copy of the folder", "seconds": best["floor"]},
            "ratio": best["edit"] / best["floor"],
            "seconds_on_cpu": best["cpu"],
        }


def opened(scores: Sequence[Score], n_layers: int) -> Thresholds:
    """Thresholds that a quarter of the candidates pass (induce), and half of those (KL)."""
    every = apply_filters(scores, n_layers, Thresholds(math.inf, -math.inf))
    kept = sorted((s for s in every if s.kept), key=lambda s: -(s.induce_score or 0.0))
    if not kept:
        return Thresholds(math.inf, -math.inf)
    kept = kept[: max(1, len(kept) // 4)]
    induce = min(s.induce_score or 0.0 for s in kept) - 1e-2
    divergences = sorted(s.kl_divergence or 0.0 for s in kept)
    return Thresholds(divergences[max(1, len(divergences) // 2) - 1] + 1e-3, induce)


def demo(device: str, sizes: Sizes, place: Path, clock: Clock) -> dict[str, Any]:
    """The demo model's pipeline on the device and on the CPU."""
    winners, taken = {}, {}
    for where in dict.fromkeys((device, "cpu")):
        run = place / f"demo-{where.replace(':', '-')}"
        command = ["run", str(demo_model_dir()), "-o", str(run), "--device", where, "--dtype",
                   "float32", "-q", *sizes.demo]  # fmt: skip
        begun = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            code = abliterate_main(command)
        taken[where] = time.perf_counter() - begun
        if code:
            raise RuntimeError(f"abliterate {' '.join(command)} ends with {code}")
        winners[where] = json.loads((run / "selection.json").read_text())["winner"]
    same = winners[device] == winners["cpu"]
    if not same:
        clock.failures.append(f"demo: another winner than on the CPU: {winners}")
    return {
        "seconds": taken[device],
        "floor": {"what": "the same on the CPU", "seconds": taken["cpu"]},
        "winner": winners[device],
        "same_winner": same,
    }


def measure_shape(
    config: PreTrainedConfig, device: torch.device, clock: Clock, bench: Mapping[str, Any],
    place: Path | None, heavy: float, found: dict[str, Any], keep: Callable[[], object],
) -> None:  # fmt: skip
    """All parts of one shape.

    Args:
        config: of the model.
        device: where it is built.
        clock: tells what there is time for.
        bench: the other fields of :class:`Bench`.
        place: a folder for the edit, or None to leave it out.
        heavy: seconds that a part may take.
        found: filled in.
        keep: called when a part has come in.
    """
    with torch.device("meta"):
        numbers = sum(p.numel() for p in build_model(config, dtype=torch.bfloat16).parameters())
    need, free = 2 * numbers, free_memory(device)
    found["parameters"] = numbers
    if 1.3 * need > free:
        found["skipped"] = f"{free / 1e9:.1f} GB are free, {1.3 * need / 1e9:.1f} are needed"
        return
    torch.manual_seed(0)
    # Random numbers are drawn where the weights lie, if the device can.
    with device if device.type in ("cuda", "xpu", "mps") else contextlib.nullcontext():
        model = build_model(config, dtype=torch.bfloat16)
    model = model.to(device).eval()
    checkpoint = find_checkpoint(str(demo_model_dir()))
    loaded = LoadedModel(model, load_tokenizer(checkpoint), checkpoint)
    its = Bench(loaded, device, **bench)
    for name in ("extract", "select", "generate"):
        found[name] = clock.part(name, heavy, getattr(its, name))
        keep()
    if place is not None:
        edit = partial(its.orthogonalize, place)
        found["orthogonalize"] = clock.part("orthogonalize", heavy, edit)
    del its, loaded, model
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def about(device: torch.device) -> dict[str, Any]:
    """The device and the versions."""
    module = torch.get_device_module(device)
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else str(device)
    info = getattr(module, "mem_get_info", None)
    return {
        "device": {
            "type": device.type,
            "name": name if device.type != "cpu" else platform.processor() or platform.machine(),
            "memory": None if device.type == "cpu" or info is None else int(info(device)[1]),
            "cores": torch.get_num_threads(),
        },
        "versions": versions() | {"cuda": torch.version.cuda},
    }


def main(argv: Sequence[str] | None = None, count_waits: CountWaits = count_cuda_waits) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script out")
    parser.add_argument("--repeats", type=int, help="times that each is measured (3; tiny: 0)")
    parser.add_argument("--seconds", type=float, default=440, help="for everything")
    parser.add_argument("-o", "--output", type=Path, help="write the document there too")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
    except abliterate.AbliterateError as error:
        with speaking_of_options():
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if device.type == "cpu" and not args.tiny:
        print("error: there is no accelerator here; --device cpu is for --tiny", file=sys.stderr)
        return 2
    clock = Clock(args.seconds)
    sizes, repeats = (TINY, args.repeats or 0) if args.tiny else (Sizes(), args.repeats or 3)
    bench = {"sizes": sizes, "repeats": repeats, "count_waits": count_waits}
    document: dict[str, Any] = about(device) | {"tiny": args.tiny, "shapes": {}}

    def keep() -> str:
        """What there is so far, so that a run that is cut off is not for nothing."""
        text = json.dumps(
            document | {"seconds": clock.seconds, "failures": clock.failures}, indent=1
        )
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(text + "\n")
        return text

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        place = Path(folder)
        document["demo"] = clock.part(
            "demo model", 60, lambda: demo(str(device), sizes, place, clock)
        )
        keep()
        for at, (name, config) in enumerate((TINY_SHAPES if args.tiny else SHAPES).items()):
            edit = place if at == 0 else None
            found = document["shapes"][name] = {}
            run = (config(), device, clock, bench, edit, 40.0, found, keep)
            failed = clock.part(name, 40, lambda run=run: measure_shape(*run))
            found |= failed or {}
    print(keep())
    return 1 if clock.failures else 0


if __name__ == "__main__":
    sys.exit(main())
