"""The map from parameters to tensors on disk, proved by editing files and loading them again.

For every architecture: each parameter with a d_model-sized axis is edited on disk where the map
says, and in memory along the same axis; loading the edited files must give the edited parameters,
and nothing else may change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from architectures.zoo import (
    decoder_only_types,
    shallow_model,
    shallow_vision_language_model,
    tiny_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from abliterate.writers.disk_tensors import DiskMap, DiskTensor, PlanError, disk_map, disk_tensors

Load = Callable[..., PreTrainedModel]


def d_model_of(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings()
    return int(embedding.weight.shape[-1])


def chosen_axes(model: PreTrainedModel) -> dict[str, int]:
    """One d_model-sized axis of every parameter that has any, a square one's chosen by its name."""
    size, axes = d_model_of(model), {}
    for name, parameter in model.named_parameters():
        if fitting := [i for i, n in enumerate(parameter.shape) if n == size]:
            digest = hashlib.sha256(name.encode()).digest()
            axes[name] = fitting[digest[0] % len(fitting)]
    return axes


def headers(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                shapes[name] = tuple(opened.get_slice(name).get_shape())
    return shapes


def direction(parameter: str, size: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(parameter.encode()).digest()[:4], "big")
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def without(tensor: Tensor, r: Tensor, axis: int) -> Tensor:
    """``tensor`` with the component along ``r`` on ``axis`` removed."""
    moved = tensor.movedim(axis, -1)
    return (moved - (moved @ r).unsqueeze(-1) * r).movedim(-1, axis)


def box(ranges: tuple[tuple[int, int], ...] | None) -> tuple[slice, ...] | slice:
    return slice(None) if ranges is None else tuple(slice(lo, hi) for lo, hi in ranges)


def edit_files(folder: Path, plan: DiskMap, before: dict[str, Tensor]) -> None:
    by_name: dict[str, list[DiskTensor]] = {}
    for planned in plan.tensors:
        by_name.setdefault(planned.name, []).append(planned)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in tensors.keys() & by_name.keys():
            for planned in by_name[name]:
                held = tensors[name][box(planned.region)]
                r = direction(planned.parameter, held.shape[planned.axis])
                check_part(planned, held, before[planned.parameter], r)
                tensors[name][box(planned.region)] = without(held, r, planned.axis)
        save_file(tensors, file, metadata={"format": "pt"})


def check_part(planned: DiskTensor, held: Tensor, parameter: Tensor, r: Tensor) -> None:
    """``part`` holds the same numbers, d_model for d_model, whatever the order of other axes."""
    part = parameter[box(planned.part)]
    there = held.movedim(planned.axis, -1).matmul(r).flatten().sort().values
    here = [
        part.movedim(i, -1).matmul(r).flatten().sort().values
        for i, size in enumerate(part.shape)
        if size == len(r)
    ]
    assert any(h.shape == there.shape and torch.allclose(h, there, atol=1e-6) for h in here)


def parameters_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def meta_twin(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        twin = type(model)._from_config(model.config)
    twin.tie_weights()
    return twin


def prove(
    load: Load,
    folder: Path,
    axes: Mapping[str, int] | None = None,
    saved_from: PreTrainedModel | None = None,
) -> DiskMap:
    """Edits the files in ``folder`` as the map says and checks what they load as."""
    with no_init_weights():  # all comes from the files
        model = load(folder, dtype=torch.float32)
    before = parameters_of(model)
    if saved_from is not None:
        for name, value in parameters_of(saved_from).items():
            assert torch.equal(before[name], value), f"{name} does not survive saving and loading"
    axes = chosen_axes(model) if axes is None else axes
    plan = disk_map(meta_twin(model), axes, headers(folder))
    edit_files(folder, plan, before)
    with no_init_weights():
        after = parameters_of(load(folder, dtype=torch.float32))
    assert after.keys() == before.keys()
    for name, value in after.items():
        expected = before[name]
        if name in axes:
            expected = without(expected, direction(name, expected.shape[axes[name]]), axes[name])
        assert torch.allclose(value, expected, atol=1e-5), f"{name} is not as edited in memory"
    return plan


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replaces the one file of a checkpoint by a changed one."""
    file = folder / "model.safetensors"
    changed = {name: t.clone() for name, t in change(load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", decoder_only_types())
def test_editing_the_files_edits_the_parameters(model_type: str, tmp_path: Path) -> None:
    """In the layout of the published files, and in the library's own where that is another."""
    model = shallow_model(model_type)
    seen: list[dict[str, tuple[int, ...]]] = []
    for original in (True, False):
        folder = tmp_path / f"original-{original}"
        model.save_pretrained(folder, max_shard_size="150KB", save_original_format=original)
        if headers(folder) in seen:
            continue
        seen.append(headers(folder))
        plan = prove(type(model).from_pretrained, folder, saved_from=model)
        assert plan.untouched == ()
        assert {t.parameter for t in plan.tensors} == chosen_axes(model).keys()


@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v4", "gpt2", "hrm_text", "llama", "mixtral", "opt", "qwen3_next", "zamba2"],
)
def test_a_checkpoint_may_lack_the_base_model_prefix(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    prefix = f"{model.base_model_prefix}."
    rewrite(tmp_path, lambda tensors: {n.removeprefix(prefix): t for n, t in tensors.items()})
    prove(type(model).from_pretrained, tmp_path, saved_from=model)


@pytest.mark.parametrize(
    "model_type",
    [
        *("aya_vision", "gemma3", "gemma4", "idefics3", "internvl", "llama4", "llava", "mistral3"),
        *("mllama", "paligemma", "qwen2_5_vl", "qwen3_5_moe", "qwen3_vl_moe"),
    ],
)
def test_the_text_decoder_of_a_vision_language_model(model_type: str, tmp_path: Path) -> None:
    model = shallow_vision_language_model(model_type)
    model.save_pretrained(tmp_path)
    decoder = [n for n, _ in model.named_parameters() if "language_model" in n or "lm_head" in n]
    assert decoder
    axes = {name: axis for name, axis in chosen_axes(model).items() if name in decoder}
    plan = prove(type(model).from_pretrained, tmp_path, axes)
    assert not any("vision" in t.name or "visual" in t.name for t in plan.tensors)


@pytest.mark.parametrize("model_type", ["llama4", "mllama", "qwen3_5", "qwen3_5_moe"])
def test_a_text_model_from_a_vision_language_checkpoint(model_type: str, tmp_path: Path) -> None:
    shallow_vision_language_model(model_type).save_pretrained(tmp_path)
    plan = prove(AutoModelForCausalLM.from_pretrained, tmp_path)
    assert any("vision" in name or "visual" in name for name in plan.untouched)
    assert not any("language_model" in name for name in plan.untouched)


def saved(model_type: str, folder: Path, **settings: object) -> PreTrainedModel:
    model = tiny_model(model_type)
    model.save_pretrained(folder, **settings)
    return model


def test_both_copies_of_tied_embeddings_are_edited(tmp_path: Path) -> None:
    model = saved("gemma2", tmp_path)
    embedding = "model.embed_tokens.weight"
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors[embedding]})
    plan = prove(type(model).from_pretrained, tmp_path)
    copies = [t for t in plan.tensors if t.parameter == embedding]
    assert {t.name for t in copies} == {t.loads_as for t in copies} == {embedding, "lm_head.weight"}


def test_tied_embeddings_may_be_stored_as_the_head(tmp_path: Path) -> None:
    model = saved("gemma2", tmp_path)
    rename = {"model.embed_tokens.weight": "lm_head.weight"}
    rewrite(tmp_path, lambda tensors: {rename.get(n, n): t for n, t in tensors.items()})
    prove(type(model).from_pretrained, tmp_path)


def test_what_the_model_does_not_load_is_untouched(tmp_path: Path) -> None:
    model = saved("deepseek_v3", tmp_path)
    extra = {
        "model.layers.4.mlp.experts.0.down_proj.weight": (48, 40),
        "model.layers.4.eh_proj.weight": (48, 96),
    }
    plan = disk_map(model, chosen_axes(model), {**headers(tmp_path), **extra})
    assert set(plan.untouched) == set(extra)


def test_experts_are_parts_of_their_parameter(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path)
    name = "model.layers.2.mlp.experts.down_proj"
    tensors = disk_tensors(model, {name: 1}, headers(tmp_path))
    assert tensors == [
        DiskTensor(
            name=f"model.layers.2.block_sparse_moe.experts.{i}.w2.weight",
            shape=(48, 80),
            axis=0,
            parameter=name,
            loads_as=name,
            part=((i, i + 1), (0, 48), (0, 80)),
        )
        for i in range(4)
    ]


def test_a_parameter_may_be_a_region_of_a_fused_tensor(tmp_path: Path) -> None:
    model = saved("hrm_text", tmp_path)
    name = "model.L_module.layers.0.mlp.up_proj.weight"
    (tensor,) = disk_tensors(model, {name: 1}, headers(tmp_path))
    assert tensor.part is None
    assert tensor.region == ((80, 160), (0, 48))


_DOWN = "model.layers.1.mlp.experts.down_proj"
_EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


@pytest.mark.parametrize(
    ("parameters", "changes", "message"),
    [
        ({_DOWN: 1}, {_EXPERT: None}, r"down_proj is \(4, 48, 80\) in the model but \(3, 48, 80\)"),
        ({_DOWN: 1}, {_EXPERT: (48, 81)}, r"cannot join \(1, 48, 80\) and \(1, 48, 81\)"),
        ({"model.norm.weight": 0}, {"model.norm.weight": None}, "is not on disk"),
        ({"model.norm.weight": 0}, {"norm.weight": (48,)}, "loaded twice"),
        ({"model.norm.weight": 1}, {}, "has no axis 1"),
        ({"model.norm.gain": 0}, {}, "is not a parameter of MixtralForCausalLM"),
        ({_DOWN: 0}, {}, "d_model axis is cut"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    parameters: dict[str, int],
    changes: dict[str, tuple[int, ...] | None],
    message: str,
    tmp_path: Path,
) -> None:
    model = saved("mixtral", tmp_path)
    on_disk = {n: s for n, s in {**headers(tmp_path), **changes}.items() if s is not None}
    with pytest.raises(PlanError, match=message):
        disk_map(model, parameters, on_disk)


def test_a_quantised_checkpoint_is_refused() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(PlanError, match="quantised \\(fp8\\)"):
        disk_map(model, {}, {})
