"""The emulated device is as strict as the devices that it stands for."""

from __future__ import annotations

import gc

import accelerator
import pytest
import torch


def test_tensors_say_where_they_are_and_stay_there() -> None:
    with accelerator.accelerator(devices=2):
        assert torch.accelerator.current_accelerator() == torch.device("emu")
        assert torch.accelerator.device_count() == 2
        made = torch.ones(3, device="emu")
        assert str(made.device) == "emu:0"
        assert str((made * 2).device) == "emu:0"
        assert str(made.to("emu:1").device) == "emu:1"
        assert str(made[[0, 2]].device) == "emu:0"
        assert made.cpu().device.type == "cpu"
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.ones(3, device="emu:2")


def test_tensors_of_two_devices_do_not_meet() -> None:
    with accelerator.accelerator(devices=2):
        here, there = torch.ones(3, device="emu"), torch.ones(3)
        assert (here * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a number may come along
        for other in (there, torch.ones(3, device="emu:1")):
            with pytest.raises(RuntimeError, match="at least two devices"):
                here + other
        with pytest.raises(RuntimeError, match="at least two devices"):
            here.masked_fill(there > 0, 0)
        with pytest.raises(TypeError, match="can't convert emu:0"):
            here.numpy()


@pytest.mark.parametrize("operator", ["linear", "matmul", "attention"])
def test_operators_in_one_piece_are_as_strict_as_in_parts(operator: str) -> None:
    """What the device carries out whole meets no tensor of another place and nothing wide."""
    function = torch.nn.functional
    carried_out = {
        "linear": lambda one, other: function.linear(one, other),
        "matmul": torch.matmul,
        "attention": lambda one, other: function.scaled_dot_product_attention(
            one, one, one, attn_mask=other
        ),
    }[operator]
    shape = (2, 3, 4, 4) if operator == "attention" else (4, 4)
    one, other = torch.randn(shape), torch.randn(4, 4)
    with accelerator.accelerator(float64=False, devices=2) as state, torch.no_grad():
        here, there = one.to("emu"), other.to("emu")
        state.waits.clear()
        found = carried_out(here, there)
        assert str(found.device) == "emu:0"
        assert not state.waits
        torch.testing.assert_close(found.cpu(), carried_out(one, other))
        for foreign in (other, other.to("emu:1")):
            with pytest.raises(RuntimeError, match="at least two devices"):
                carried_out(here, foreign)
        with pytest.raises(TypeError, match="doesn't support float64"):
            carried_out(here.double(), there.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_wide_numbers_exist_where_they_are_said_to(dtype: torch.dtype) -> None:
    with accelerator.accelerator(float64=True):
        assert torch.ones(3, device="emu").to(dtype).sum().item() == 3
    with accelerator.accelerator(float64=False):
        ones = torch.ones(3, device="emu")
        for make in (
            lambda: ones.to(dtype),
            lambda: torch.zeros(3, dtype=dtype, device="emu"),
            lambda: torch.zeros(3, dtype=dtype).to("emu"),
            lambda: ones.to("cpu", dtype),  # the device would cast before it copies
            lambda: ones.sum(dtype=dtype),
        ):
            with pytest.raises(TypeError, match="doesn't support float64"):
                make()
        assert ones.cpu().to(dtype).sum() == 3


def test_memory_runs_out_and_comes_back() -> None:
    with accelerator.accelerator(memory=1000) as state:
        first = torch.zeros(200, device="emu")
        with pytest.raises(torch.OutOfMemoryError, match="emu out of memory"):
            first + 1
        view = first[:100]
        assert state.used[0] == 800
        del first
        gc.collect()
        assert state.used[0] == 800  # the view still needs it
        assert torch.emu.mem_get_info() == (200, 1000)
        del view
        gc.collect()
        assert state.used[0] == 0
        assert (torch.zeros(200, device="emu")).sum().item() == 0
        assert (state.peak, state.refused) == (804, 1)


def test_what_the_host_waits_for_is_counted() -> None:
    with accelerator.accelerator() as state:
        here = torch.arange(4.0, device="emu")
        above = here > 1
        assert state.synchronisations() == 0
        for wait in (
            lambda: here.sum().item(),
            lambda: here.tolist(),
            lambda: bool(above.any()),
            lambda: here.cpu(),
            lambda: here.to("cpu"),
            lambda: here[above],  # how many there are
            lambda: above.nonzero(),
            lambda: torch.empty(4).copy_(here),
        ):
            before = state.synchronisations()
            wait()
            assert state.synchronisations() == before + 1
        here[[0, 1]]  # the list goes up, from memory that is not pinned
        assert state.synchronisations() == before + 2
        assert {wait.kind for wait in state.waits} == {"down", "up", "size"}
