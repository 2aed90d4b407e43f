"""A checkpoint four times larger than an enforced memory limit.

The limit is ``RLIMIT_DATA``: the kernel refuses every private writable page beyond it (heap,
anonymous mappings, thread stacks), touched or not, so it bounds what the process allocates from
above. Pages of a file that is mapped shared are the page cache's and do not count, as they need not
stay. (``RLIMIT_RSS`` does nothing on Linux, ``RLIMIT_AS`` would count the mappings, and a control
group, which ``scripts/bench_offload.py`` uses, takes root.)
"""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3MoeConfig
from warm_python import Begun, warm_python

from abliterate import extract, load_model, load_prompts
from abliterate.extraction.extraction import Extraction

LAYERS, EXPERTS, WIDTH, INNER = 46, 8, 512, 1024
# Layers of the same weights, so that what the model in memory gives can be had from three layers:
# each of them, over and over, where the streamed model has 46 tensors of every name.
DISTINCT = 3
POSITIONS = "-2,-1"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")

CHILD = """
import json, resource, sys
from pathlib import Path
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from abliterate.cli.app import main
code = main(sys.argv[2:])
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"code": code, "peak": int(status["VmHWM"].split()[0]) << 10}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A mixture of experts, which the library fuses on loading; one shard for each layer."""
    folder = tmp_path_factory.mktemp("large")
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=WIDTH, intermediate_size=INNER, moe_intermediate_size=INNER,
        num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        num_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=256,
        tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"], dtype="float32",
        eos_token_id=2, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator) / shape[1] ** 0.5

    def layer() -> dict[str, torch.Tensor]:
        tensors = {
            "input_layernorm": 1 + 0.1 * matrix(1, WIDTH)[0],
            "post_attention_layernorm": torch.ones(WIDTH),
            "self_attn.q_norm": torch.ones(64),
            "self_attn.k_norm": torch.ones(64),
            "self_attn.q_proj": matrix(512, WIDTH),
            "self_attn.k_proj": matrix(128, WIDTH),
            "self_attn.v_proj": matrix(128, WIDTH),
            "self_attn.o_proj": matrix(WIDTH, 512),
            "mlp.gate": matrix(EXPERTS, WIDTH),
        }
        for expert in range(EXPERTS):
            own = f"mlp.experts.{expert}"
            tensors[f"{own}.gate_proj"] = matrix(INNER, WIDTH)
            tensors[f"{own}.up_proj"] = matrix(INNER, WIDTH)
            tensors[f"{own}.down_proj"] = matrix(WIDTH, INNER)
        return tensors

    layers = [layer() for _ in range(DISTINCT)]
    rest = {
        "model.embed_tokens.weight": matrix(512, WIDTH),
        "model.norm.weight": torch.ones(WIDTH),
        "lm_head.weight": matrix(512, WIDTH),
    }
    index: dict[str, str] = {}
    for number in range(LAYERS + 1):
        name = f"model-{number + 1:05}-of-{LAYERS + 1:05}.safetensors"
        at = f"model.layers.{number}"
        own = layers[number % DISTINCT].items() if number < LAYERS else ()
        tensors = {f"{at}.{key}.weight": tensor for key, tensor in own} or rest
        save_file(tensors, folder / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    document = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    for file in tokenizer_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _in_memory(large: Path, folder: Path) -> Extraction:
    """What extraction gives with the weights in memory, where equal layers are one."""
    folder.mkdir()
    for file in large.iterdir():
        (folder / file.name).hardlink_to(file)
    config = json.loads((large / "config.json").read_text())
    short = {"num_hidden_layers": DISTINCT, "layer_types": None}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | short))
    document = json.loads((large / "model.safetensors.index.json").read_text())
    kept = {
        name: file
        for name, file in document["weight_map"].items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < DISTINCT
    }
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(document | {"weight_map": kept})
    )
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    layers = loaded.model.model.layers
    memo = {id(parameter): parameter for parameter in layers.parameters()}
    loaded.model.model.layers = nn.ModuleList(
        deepcopy(layers[n % DISTINCT], dict(memo)) for n in range(LAYERS)
    )
    loaded.model.config.num_hidden_layers = LAYERS
    prompts = [load_prompts(kind, "train", 4) for kind in ("harmful", "harmless")]
    return extract(loaded, *prompts, POSITIONS, ["I"], filter=False)


def _start(model: Path, run: Path, limit: int, *options: str) -> Begun:
    arguments = [
        "extract", model, "-o", run, "--no-filter", "--refusal-token", "I", "--n-train", "4",
        "--dtype", "float32", "--positions", POSITIONS, *options,
    ]  # fmt: skip
    return warm_python().begin("-c", CHILD, str(limit), *map(str, arguments))


def _end(begun: Begun) -> tuple[dict[str, int], str]:
    ended = begun.end()
    lines = ended.out.splitlines()
    return (json.loads(lines[-1]) if lines else {"code": ended.code}), ended.err


def test_a_checkpoint_four_times_the_memory_limit(large: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    limit = size // 4
    budget = 64 << 20
    # At once: each has a limit of its own.
    plain = _start(large, tmp_path / "limited", limit, "--no-offload")
    stream = _start(
        large, tmp_path / "streamed", limit, "--offload", "--activation-memory", str(budget)
    )
    try:
        wanted = _in_memory(large, tmp_path / "whole")
        assert _end(plain)[0]["code"] != 0, "the limit does not bind"
        streamed, error = _end(stream)
    finally:
        plain.running.kill()
        stream.running.kill()
    assert streamed["code"] == 0, error
    block = (size // LAYERS) + (1 << 20)
    rows = 512 * WIDTH * 4
    assert streamed["peak"] <= block + rows + budget + (512 << 20)
    record = json.loads((tmp_path / "streamed" / "extract.json").read_text())
    assert record["offload"]["bytes_read"] <= 1.01 * size
    got = load_file(tmp_path / "streamed" / "directions.safetensors")
    for name in ("mean_harmful", "mean_harmless"):
        mean = getattr(wanted, name)
        assert mean.shape == (2, LAYERS, WIDTH)
        assert (got[name] - mean).norm() <= 1e-5 * mean.norm()
