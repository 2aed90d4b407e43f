"""orthogonalize_ in memory against the edit on disk, and what judges checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import abliterate as ab
from abliterate.errors import InputError, UnsupportedArchitectureError, UsageError


def _vector() -> torch.Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["llama-bias", "qwen2"])  # qwen2: the head is tied
def test_the_edit_in_memory_is_the_edit_on_disk(tiny, tmp_path: Path, kind: str) -> None:
    lm = ab.load(str(tiny(kind)), device="cpu")
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7]])
    edited = ab.orthogonalize_(lm, _vector())
    with torch.no_grad():
        here = lm.model(ids).logits
    made = ab.orthogonalize(str(tiny(kind)), _vector().numpy(), tmp_path / "out")
    on_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in on_disk.state_dict().items():
        assert torch.allclose(value, lm.model.state_dict()[name], atol=1e-6), name
    with torch.no_grad():
        assert torch.allclose(here, on_disk(ids).logits, atol=1e-4)
    assert {tensor.name for tensor in edited.tensors} == {tensor.name for tensor in made}
    assert edited.proven
    assert edited.leak < 1e-5 < 1e-2 < edited.leak_before
    lm.model.save_pretrained(tmp_path / "saved")  # as it is in memory
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(here, again(ids).logits)
    edited.restore()
    edited.restore()
    after = lm.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tied = lm.model.config.tie_word_embeddings
    head, embedding = lm.model.get_output_embeddings(), lm.model.get_input_embeddings()
    assert tied == (kind == "qwen2") == (head.weight is embedding.weight)


def test_an_edit_that_leaves_something_changes_nothing(tiny, monkeypatch) -> None:
    lm = ab.load(str(tiny("llama")), device="cpu")
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    from abliterate.editing import in_memory

    def skip_one(parameter: torch.Tensor, axis: int, basis: torch.Tensor) -> tuple[float, float]:
        return (0.0, 0.0) if parameter.shape == (48, 80) else real(parameter, axis, basis)

    real = in_memory._project_out
    monkeypatch.setattr(in_memory, "_project_out", skip_one)
    with pytest.raises(ab.AbliterateError, match="the model is as it was"):
        ab.orthogonalize_(lm, _vector())
    assert all(torch.equal(before[n], value) for n, value in lm.model.state_dict().items())
    with pytest.raises(InputError, match="the direction"):
        ab.orthogonalize_(lm, torch.zeros(48))
    streamed = ab.load(str(tiny("llama")), device="cpu", offload=True)
    with pytest.raises(UsageError, match="streamed"):
        ab.orthogonalize_(streamed, _vector())
    streamed.close()


def test_what_cannot_be_made_exact_is_refused(tiny) -> None:
    lm = ab.load(str(tiny("llama")), device="cpu")
    from dataclasses import replace

    from abliterate.editing import in_memory

    proof = in_memory.proof_of(lm.model.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_memory, "proof_of", lambda config: replace(proof, exact=False, leak=0.5))
        with pytest.raises(UnsupportedArchitectureError, match="allow_leak"):
            ab.orthogonalize_(lm, _vector())
        with ab.orthogonalize_(lm, _vector(), allow_leak=0.6) as edited:
            assert not edited.proven


def test_judges_of_checkpoints_give_records_and_tables(tiny, tmp_path: Path) -> None:
    source = tiny("llama")
    direction = ab.Direction(_vector(), -1, 2)
    out = tmp_path / "out"
    edit = ab.orthogonalize(source, direction, out)
    assert len(edit.to_dict()["tensors"]) == len(edit) == 9
    assert edit[0].before > edit[0].after
    checked = ab.verify(out, source=source, direction=direction)
    assert checked
    assert ab.verify(out).passed  # along the direction that the record holds
    assert not ab.verify(source, direction=direction)
    audit = ab.audit(out, base=source)
    assert audit.verdict == "edited"
    assert audit.direction is not None
    assert abs(direction.cosine(audit.direction)) > 0.999
    assert ab.audit(source, base=source).verdict == "clean"
    found = ab.diff(source, out)
    assert set(found.changed) == {tensor.name for tensor in edit}
    table = ab.writers(source)
    assert table.exact
    assert len(table) == len(edit) == len(ab.writers(ab.load(source, device="cpu")))
    for result in (edit, checked, audit, found, table):
        json.dumps(result.to_dict(), allow_nan=False)
        assert len(result.to_pandas()) >= 9
        assert len(repr(result)) < 200
        assert result._repr_html_()
    with pytest.raises(UsageError, match="folder or hub id"):
        ab.verify(ab.load(source), direction=direction)  # type: ignore[arg-type]


def test_a_public_function_with_a_packages_name_is_called(tiny) -> None:
    import abliterate.writers.plan

    assert abliterate.writers.plan.WriterPlan
    assert ab.writers(tiny("llama")).model_type == "llama"
