"""Checkpoints for scripts/bench_audit.py: small trained models, and heavy-tailed random ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from abliterate.editing.edit_plan import make_plan
from abliterate.models.loading import find_checkpoint
from abliterate.prompts.sources import read_source

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 320  # bytes, and a few that are never seen

_WIDE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_of(kind: str, width: int, depth: int, tied: bool = False) -> Any:
    """A small configuration: ``kind`` is a model type of transformers."""
    heads = max(2, width // 32)
    common = _WIDE | {"tie_word_embeddings": tied}
    llama = common | {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "intermediate_size": int(2.75 * width),
    }
    if kind == "gpt2":
        size = {"n_embd": width, "n_layer": depth, "n_head": heads, "n_positions": 128}
        return AutoConfig.for_model(kind, **common, **size)
    if kind == "mamba":
        size = {"hidden_size": width, "num_hidden_layers": depth, "state_size": 8}
        return AutoConfig.for_model(kind, **common, **size, use_mambapy=False)
    if kind in ("gpt_neox", "opt", "phi"):
        llama.pop("num_key_value_heads")
        llama["intermediate_size"] = llama["ffn_dim"] = 4 * width
        if kind == "opt":
            llama["word_embed_proj_dim"] = width
        return AutoConfig.for_model(kind, **llama)
    if kind in ("gemma2", "gemma3_text", "qwen3", "qwen3_moe", "glm4"):
        llama["head_dim"] = width // heads
    if kind == "gemma2":
        llama["query_pre_attn_scalar"] = width // heads
    if kind in ("qwen3_moe", "mixtral"):
        moe = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
        llama |= moe | {"moe_intermediate_size": width}
        llama["intermediate_size"] = width
    return AutoConfig.for_model(kind, **llama)


def build(kind: str, width: int, depth: int, seed: int, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = config_of(kind, width, depth, tied)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )


def corpus() -> Tensor:
    """Bytes of the bundled prompts and of this repository's prose."""
    texts = [p.text for kind in ("harmful", "harmless") for p in read_source(kind).splits["train"]]
    texts += [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    texts += [path.read_text() for path in sorted((ROOT / "src/abliterate").glob("*.py"))]
    return torch.tensor(list("\n".join(texts).encode()), dtype=torch.long) + 3


def train(
    model: PreTrainedModel, data: Tensor, steps: int, seed: int, decay: float = 0.1
) -> Iterator[int]:
    """AdamW on next bytes; yields after each quarter of the steps."""
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=decay
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(1, steps + 1):
        rate = min(step / 20, 1.0) * (1 - 0.9 * step / steps)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * rate
        starts = torch.randint(0, len(data) - 65, (8,), generator=generator)
        batch = torch.stack([data[s : s + 64] for s in starts])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % max(1, steps // 4) == 0:
            model.eval()
            yield step
            model.train()
    model.eval()


@torch.no_grad()
def difference_of_means(model: PreTrainedModel) -> Tensor:
    """The method's own candidate: harmful minus harmless at the last token, middle block."""
    means = []
    layer = model.config.num_hidden_layers // 2
    for kind in ("harmful", "harmless"):
        total = torch.zeros(model.config.hidden_size, dtype=torch.float64)
        for prompt in read_source(kind).splits["train"][:48]:
            ids = torch.tensor([list(prompt.text.encode()[-100:])]) + 3
            output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
            total += output.hidden_states[layer][0, -1].double()
        means.append(total / 48)
    difference: Tensor = means[0] - means[1]
    return difference


@dataclass(frozen=True)
class Shape:
    """How a random model's matrices look.

    Attributes:
        power: eigenvalues of a writer's gram fall as ``rank ** -power``.
        shared: how alike the writers' eigenbases are, 0 to 1.
        rows: spread of the rows' norms (log-normal), the same in all writers.
        dead: share of channels that no matrix writes or reads.
        pruned: share of each writer's rows that are zero, its own ones.
        zero_gains: share of the gains of norms that are zero.
    """

    power: float = 1.0
    shared: float = 0.3
    rows: float = 0.3
    dead: float = 0.0
    pruned: float = 0.0
    zero_gains: float = 0.0


@torch.no_grad()
def shape_weights(model: PreTrainedModel, shape: Shape, folder: Path, seed: int) -> None:
    """Give the writers heavy-tailed spectra with correlated rows, and save the model."""
    generator = torch.Generator().manual_seed(seed)
    model.save_pretrained(folder)
    plan = make_plan(find_checkpoint(str(folder)), torch.ones(model.config.hidden_size))
    width = model.config.hidden_size
    base = _basis(width, generator)
    spread = torch.exp(shape.rows * torch.randn(width, generator=generator, dtype=torch.float64))
    dead = torch.randperm(width, generator=generator)[: round(shape.dead * width)]
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = {edit.name: edit.axis for edit in plan.edits}
    for name, value in tensors.items():
        if value.ndim == 1:
            noisy = value + 0.1 * torch.randn(value.shape, generator=generator)
            if "norm" in name or "ln_" in name:
                cut = torch.rand(value.shape, generator=generator) < shape.zero_gains
                noisy = torch.where(cut, torch.zeros_like(noisy), noisy)
            tensors[name] = noisy
        elif name in names and value.ndim in (2, 3):
            stack = value if value.ndim == 3 else value.unsqueeze(0)
            axis = names[name] - (value.ndim - 2)
            new = []
            for one in stack:
                moved = one if axis == 0 else one.T
                new_one = _heavy(moved.shape[1], base, spread, shape, generator)
                rows = torch.rand(width, generator=generator) < shape.pruned
                new_one[rows] = 0
                new_one[dead] = 0
                new_one *= float(one.norm()) / float(new_one.norm())
                new.append(new_one if axis == 0 else new_one.T)
            tensors[name] = (torch.stack(new) if value.ndim == 3 else new[0]).float().contiguous()
        elif value.ndim == 2 and value.shape[1] == width:
            tensors[name] = value.clone()
            tensors[name][:, dead] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _basis(width: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(width, width, generator=generator, dtype=torch.float64)
    q: Tensor = torch.linalg.qr(noise)[0]
    return q


def _heavy(
    columns: int, base: Tensor, spread: Tensor, shape: Shape, generator: torch.Generator
) -> Tensor:
    width = len(base)
    own = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    basis = torch.linalg.qr(shape.shared * base + (1 - shape.shared) * own)[0]
    values = torch.arange(1, width + 1, dtype=torch.float64) ** (-shape.power / 2)
    noise = torch.randn(width, columns, generator=generator, dtype=torch.float64)
    return spread.unsqueeze(1) * (basis @ (values.unsqueeze(1) * noise))


_RANDOM_KINDS = (
    "llama", "gpt2", "gemma2", "qwen2", "qwen3_moe", "gpt_neox", "olmo2", "mistral", "qwen3",
    "phi", "opt", "mixtral", "gemma3_text", "glm4", "mamba", "starcoder2", "cohere",
)  # fmt: skip
_WIDTHS = (32, 64, 64, 96, 96, 128, 128, 160, 192, 256)
_DEPTHS = (1, 2, 3, 4, 4, 6, 6, 8)


def random_checkpoints(
    folder: Path, indices: Iterable[int]
) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Unedited checkpoints of every kind: their names, and what makes each in the same folder."""
    generator = torch.Generator()

    def draw(choices: tuple[Any, ...]) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    for index in indices:
        generator.manual_seed(5000 + index)
        kind = _RANDOM_KINDS[index % len(_RANDOM_KINDS)]
        width, depth, tied = draw(_WIDTHS), draw(_DEPTHS), draw((True, False))
        shape = Shape(
            draw((0.0, 0.5, 1.0, 1.5, 2.0, 3.0)),
            draw((0.0, 0.3, 0.6, 0.9)),
            draw((0.0, 0.3, 0.8)),
            draw((0.0, 0.0, 0.02, 0.1)),
            draw((0.0, 0.0, 0.05, 0.3)),
            draw((0.0, 0.0, 0.05)),
        )
        dtype = draw((torch.float32, torch.bfloat16, torch.float16))
        name = f"random {index}: {kind}, d {width}, {depth} blocks, tied {tied}, {shape}, {dtype}"
        size = (kind, width, depth, 100 + index, tied)
        yield name, partial(_make_random, folder, size, shape, dtype)


def _make_random(
    folder: Path, size: tuple[str, int, int, int, bool], shape: Shape, dtype: torch.dtype
) -> Path:
    from safetensors.torch import load_file, save_file

    shape_weights(build(*size), shape, folder, seed=size[3])
    path = folder / "model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path, {"format": "pt"})
    return folder


def decay(folder: Path, share: float) -> None:
    """Benign: all writers are scaled down alike, ``W' = (1 - share) W``."""
    _change_writers(folder, lambda matrix, _: (1 - share) * matrix)


def merge_rank_one(folder: Path, size: float) -> None:
    """Benign: a rank-1 LoRA of this size, relative to each writer, is merged into it.

    It has the rank of an edit, but takes nothing in proportion to what was there.
    """

    def merged(matrix: Tensor, generator: torch.Generator) -> Tensor:
        up = torch.randn(matrix.shape[0], generator=generator, dtype=torch.float64)
        down = torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64)
        update = torch.outer(up, down)
        return matrix + size * float(matrix.norm()) * update / float(update.norm())

    _change_writers(folder, merged)


def _change_writers(folder: Path, change: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    """Change every writer's matrix ``[d_model, columns]`` of a checkpoint in place."""
    from safetensors.torch import load_file, save_file

    path, generator = folder / "model.safetensors", torch.Generator().manual_seed(4)
    tensors = load_file(path)
    width = int(AutoConfig.from_pretrained(folder).hidden_size)
    for edit in make_plan(find_checkpoint(str(folder)), torch.ones(width)).edits:
        value = tensors[edit.name]
        if value.ndim < 2:
            continue
        moved = value.double().movedim(edit.axis, 0)
        new = change(moved.reshape(len(moved), -1), generator).reshape(moved.shape)
        tensors[edit.name] = new.movedim(0, edit.axis).to(value.dtype).contiguous()
    save_file(tensors, path, {"format": "pt"})
