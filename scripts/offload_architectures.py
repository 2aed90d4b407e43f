#!/usr/bin/env python3
"""Is a streamed model the same as one in memory, for every architecture? Prints a table.

    python scripts/offload_architectures.py [TYPE ...]

Tiny random models of every decoder-only type and some vision-language ones, saved and then run
from disk block by block (embeddings and projection too) and in memory: largest difference of
last-token logits over their spread, of the activations at every block relative to their norm, and
bytes read over the checkpoint's. A few minutes; exits with 1 if a difference is no rounding.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/support"))

from architectures.zoo import (  # noqa: E402
    decoder_only_types,
    tiny_model,
    tiny_vision_language_model,
)

from abliterate.errors import AbliterateError  # noqa: E402
from abliterate.inference.engine import BatchActivations  # noqa: E402
from abliterate.inference.in_memory import collect_activations  # noqa: E402
from abliterate.models.loading import Checkpoint, load_weights  # noqa: E402
from abliterate.offload import open_model  # noqa: E402
from abliterate.offload.weight_passes import look  # noqa: E402

VISION_LANGUAGE = (
    "aya_vision", "gemma3", "gemma4", "idefics3", "internvl", "llava", "mistral3", "paligemma",
    "qwen2_5_vl", "qwen3_vl_moe",
)  # fmt: skip
PROMPTS = [list(range(first, first + n)) for first, n in ((3, 8), (20, 12), (40, 16), (60, 8))]
POSITIONS = [-2, -1]


def compare(folder: Path) -> tuple[float, float, float]:
    """Differences of logits and activations, and bytes read."""
    checkpoint = Checkpoint(str(folder), folder)
    model = load_weights(checkpoint, "cpu", "float32")
    plain: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(seen: BatchActivations) -> None:
        plain.update({r: (seen.logits[i], seen.activations[i]) for i, r in enumerate(seen.rows)})

    collect_activations(model, PROMPTS, POSITIONS, keep, 2)
    loaded = open_model.open_stream(
        checkpoint, "cpu", "float32", activation_memory=1 << 30, resident=0
    )
    logits, activations = look(loaded.engine.offloaded, PROMPTS, POSITIONS, 2)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    loaded.engine.offloaded.close()
    return (
        max(float((logits[r] - one).abs().max() / one.std()) for r, (one, _) in plain.items()),
        max(float((activations[r] - one).norm() / one.norm()) for r, (_, one) in plain.items()),
        loaded.engine.offloaded.bytes_read / size,
    )


def main() -> int:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    open_model.load_tokenizer = lambda *_: None  # the prompts are token ids
    types = sys.argv[1:] or [*decoder_only_types(), *(f"{name} (VL)" for name in VISION_LANGUAGE)]
    print("| type | logits | activations | read, of checkpoint |")
    print("|---|---:|---:|---:|")
    wrong = 0
    for name in types:
        bare = name.removesuffix(" (VL)")
        build = tiny_model if bare == name else tiny_vision_language_model
        with tempfile.TemporaryDirectory() as folder:
            build(bare).save_pretrained(folder)
            try:
                first, second, read = compare(Path(folder))
            except AbliterateError as error:
                print(f"| {name} | refused: {error} | | |", flush=True)
                continue
            wrong += not max(first, second) <= 1e-4
            print(f"| {name} | {first:.1e} | {second:.1e} | {read:.2f} |", flush=True)
    print(f"\n{wrong} of {len(types)} differ by more than rounding")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
