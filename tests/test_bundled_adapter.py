"""The LoRA adapter that ``scripts/real_model.sh`` merges: small, in bfloat16, for every block."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "adapters" / "smollm2-135m-refusal"


def test_the_adapter_is_of_its_public_base_and_touches_every_block() -> None:
    weights = ADAPTER / "adapter_model.safetensors"
    assert weights.stat().st_size < 6_000_000
    with safe_open(weights, "pt") as file:
        names = set(file.keys())
        kinds = {file.get_slice(name).get_dtype() for name in names}
    assert kinds == {"BF16"}
    # Seven matrices of each of the 30 blocks, A and B of each.
    assert len(names) == 30 * 7 * 2
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "license: apache-2.0" in (ADAPTER / "README.md").read_text()
