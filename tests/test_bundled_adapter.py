"""The LoRA adapter that ``scripts/real_model.sh`` merges: small, in bfloat16, of a few blocks."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "adapters" / "smollm2-135m-refusal"


def test_the_adapter_is_of_its_public_base_and_of_the_blocks_that_it_names() -> None:
    weights = ADAPTER / "adapter_model.safetensors"
    assert weights.stat().st_size < 2_000_000
    with safe_open(weights, "pt") as file:
        names = set(file.keys())
        kinds = {file.get_slice(name).get_dtype() for name in names}
    assert kinds == {"BF16"}
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    # Seven matrices of each of the blocks, A and B of each.
    assert config["layers_to_transform"] == list(range(8, 15))
    assert len(names) == 7 * 7 * 2
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == set(range(8, 15))
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "license: apache-2.0" in (ADAPTER / "README.md").read_text()
