"""``--layer-scale FILE``: each tensor loses its own share; what a file cannot mean is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

WEIGHTS = """
default = 0.5
[components]
embedding = 0.25
mlp = 0.75
[layers]
"0" = 0
"2" = {attention = 2.0}
"3" = 1.0
"""


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randn(4, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _expected(name: str) -> tuple[int, float]:
    """Layer and weight of a tensor, as the file says."""
    if "embed" in name:
        return 0, 0.25
    layer, kind = int(name.split(".")[2]), "mlp" if "mlp" in name else "attention"
    return layer, {
        (0, "mlp"): 0, (0, "attention"): 0, (1, "mlp"): 0.75, (1, "attention"): 0.5,
        (2, "mlp"): 0.75, (2, "attention"): 2.0, (3, "mlp"): 1.0, (3, "attention"): 1.0,
    }[layer, kind]  # fmt: skip


def test_each_tensor_loses_the_share_of_its_layer_and_component(
    tiny, cli, fails, rows, tmp_path: Path
) -> None:
    held, weights, out = tmp_path / "set.safetensors", tmp_path / "weights.toml", tmp_path / "out"
    save_file({"directions": rows}, held)
    weights.write_text(WEIGHTS)
    base = ("orthogonalize", tiny("llama"), "--direction", held, "-o", out)
    result = cli(*base, "--layer-scale", weights, "--json")
    assert result.code == 0, result.err
    assert len(result.json["tensors"]) == 7
    before, after = (load_file(f / "model.safetensors") for f in (tiny("llama"), out))
    for name in before:
        if not any(part in name for part in ("embed_tokens", "o_proj", "down_proj")):
            assert torch.equal(before[name], after[name])
            continue
        layer, weight = _expected(name)
        unit, matrix = rows[layer] / rows[layer].norm(), before[name].double()
        if "embed" in name:
            matrix = matrix - weight * torch.outer(matrix @ unit, unit)
        else:
            matrix = matrix - weight * torch.outer(unit, unit @ matrix)
        assert torch.allclose(after[name].double(), matrix, atol=1e-6), name
    assert result.json["promise"]["tensors_orthogonal"] is False
    checked = ("verify", out, "--direction", held, "--source", tiny("llama"))
    assert cli(*checked).code == 0
    record = out / "abliterate.json"
    again = tmp_path / "again"
    assert cli("orthogonalize", tiny("llama"), "--direction", record, "-o", again).code == 0
    same = load_file(again / "model.safetensors")
    assert all(torch.equal(after[name], same[name]) for name in after)
    document = json.loads(record.read_text())
    document["options"]["layer_scale"]["layers"]["3"] = 0.5
    record.write_text(json.dumps(document))
    assert cli(*checked).code == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers": {"9": 1}}', "layer 9"),
        ('{"layers": {"0-2": 1, "2": 0.5}}', "layer 2 is given twice"),
        ('{"layers": {"x": 1}}', "not 'x'"),
        ('{"layers": {"1": {"heads": 1}}}', "'heads' is no component"),
        ('{"components": {"heads": 1}}', "'heads' is no component"),
        ('{"layer": {}}', "layer"),
        ('{"default": "x"}', "default"),
        ('{"default": 0}', "no tensor is left"),
        ("[]", "the document"),
        ("text", "no JSON or TOML"),
    ],
)
def test_weights_that_mean_nothing_are_named(
    text: str, message: str, tiny, fails, tmp_path: Path
) -> None:
    file, vector = tmp_path / "weights.json", tmp_path / "direction.safetensors"
    file.write_text(text)
    save_file({"direction": torch.ones(48)}, vector)
    line = fails("orthogonalize", tiny("llama"), "--direction", vector, "-o", tmp_path / "out",
                 "--layer-scale", file, code=2)  # fmt: skip
    assert message in line
    assert not (tmp_path / "out").exists()
