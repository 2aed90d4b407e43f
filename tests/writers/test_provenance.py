"""Traced tensors against real ones whose every element is its own address."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import core_model_loading
from transformers.core_model_loading import Concatenate, ConversionOps, Transpose

from abliterate.writers.provenance import Traced, TraceError, leaf
from abliterate.writers.tensor_slices import Region, RegionError, regions

SHAPES = [(4, 6), (4, 6), (6, 4)]


def pair(number: int) -> tuple[Traced, Tensor]:
    size = SHAPES[number][0] * SHAPES[number][1]
    coded = 1000 * number + torch.arange(size).reshape(SHAPES[number])
    return leaf(number, SHAPES[number]), coded


def decoded(traced: Traced) -> Tensor:
    """The addresses that a traced tensor claims for its elements."""
    index = torch.cartesian_prod(*(torch.arange(n) for n in traced.shape))
    numbers, offsets = traced.at(index.reshape(-1, traced.ndim).T)
    return (1000 * numbers + offsets).reshape(traced.shape)


CHAINS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "stack": lambda a, b, c: torch.stack([a, b, c.T]),
    "cat": lambda a, b, c: torch.cat([a, b, c.T], dim=-1),
    "chunk": lambda a, b, c: torch.cat([a, b]).chunk(4)[2],
    "split": lambda a, b, c: torch.cat([a, c.T]).split([3, 5])[1],
    "transposed": lambda a, b, c: torch.stack([a, b]).transpose(0, 2).contiguous(),
    "permuted": lambda a, b, c: torch.stack([a, b]).permute(2, 0, 1).reshape(3, -1),
    "interleaved": lambda a, b, c: a.reshape(2, 2, 6).transpose(0, 1).reshape(4, 6),
    "indexed": lambda a, b, c: torch.stack([a, b], dim=1)[1:, 0, ::2].flatten(),
    "unbound": lambda a, b, c: torch.stack(torch.stack([a, b]).unbind(1)[1:]),
    "squeezed": lambda a, b, c: torch.cat([a[None], b[None]]).chunk(2)[1].squeeze(0),
    "cast": lambda a, b, c: c.to(torch.float64).mT.clone(),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
def test_elements_keep_their_addresses(chain: Callable[..., Tensor]) -> None:
    traced, coded = zip(*(pair(i) for i in range(3)), strict=True)
    result, expected = chain(*traced), chain(*coded)
    assert isinstance(result, Traced)
    assert torch.equal(decoded(result), expected.long())


# Since transformers 5.14.
Interleave = getattr(core_model_loading, "Interleave", None)
INTERLEAVED = [Interleave(dim=0), Interleave(dim=1, inverse=True)] if Interleave else []


@pytest.mark.parametrize("op", [*INTERLEAVED, Transpose(), Concatenate(dim=0)], ids=repr)
def test_the_librarys_operations_run_on_it(op: ConversionOps) -> None:
    traced, coded = pair(0)
    results = [
        op.convert({"a": [tensor]}, source_patterns=["a"], target_patterns=["b"], config=None)
        for tensor in (traced, coded)
    ]
    assert torch.equal(decoded(results[0]["b"]), results[1]["b"])


@pytest.mark.parametrize(
    "change", [lambda a: a + 1, lambda a: a @ a.T, lambda a: a.flip(0)], ids=["add", "mm", "flip"]
)
def test_computing_values_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TraceError, match="cannot follow"):
        change(leaf(0, (4, 6)))


def test_a_grid_of_boxes() -> None:
    a, b, c = (leaf(i, shape) for i, shape in enumerate(SHAPES))
    grid = torch.stack([torch.cat([a, b]), torch.cat([c.T, a])])
    found = sorted(regions(grid, 2, SHAPES), key=lambda box: box.part)  # type: ignore[arg-type]
    whole = ((0, 4), (0, 6))
    assert found[1:3] == [
        Region(1, ((0, 1), (4, 8), (0, 6)), whole, (None, 0, 1)),
        Region(2, ((1, 2), (0, 4), (0, 6)), ((0, 6), (0, 4)), (None, 1, 0)),
    ]


def test_the_axis_must_be_whole() -> None:
    a, b, _ = (leaf(i, shape) for i, shape in enumerate(SHAPES))
    with pytest.raises(RegionError, match="cut or permuted"):
        regions(torch.cat([a, b]), 0, SHAPES)  # type: ignore[arg-type]


def test_a_permutation_of_another_axis_leaves_one_box() -> None:
    a = leaf(0, (4, 6))
    mixed = a.reshape(2, 2, 6).transpose(0, 1).reshape(4, 6)
    (box,) = regions(mixed, 1, SHAPES)  # type: ignore[arg-type]
    assert box == Region(0, ((0, 4), (0, 6)), ((0, 4), (0, 6)), (None, 1))


def test_a_tensor_with_another_between_its_rows_stays_in_boxes() -> None:
    a, b, _ = (leaf(i, shape) for i, shape in enumerate(SHAPES))
    mixed = torch.cat([a[:2], b, a[2:]])
    assert regions(mixed, 1, SHAPES) == [  # type: ignore[arg-type]
        Region(0, ((0, 2), (0, 6)), ((0, 2), (0, 6)), (0, 1)),
        Region(0, ((6, 8), (0, 6)), ((2, 4), (0, 6)), (0, 1)),
        Region(1, ((2, 6), (0, 6)), ((0, 4), (0, 6)), (0, 1)),
    ]


@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (6, 1), (5,), (2, 3, 4)], ids=str)
def test_a_tensor_as_it_lies_on_disk_is_the_box_that_the_long_way_finds(
    shape: tuple[int, ...],
) -> None:
    there = leaf(0, shape)
    unknown = Traced(there.meta, there.origin)
    for axis in range(len(shape)):
        assert regions(there, axis, [shape]) == regions(unknown, axis, [shape])


def test_only_a_tensor_as_it_lies_on_disk_is_known_to_be_whole() -> None:
    square = leaf(3, (4, 4))
    assert square[...].whole == square.view(4, 4).whole == 3  # type: ignore[attr-defined]
    for changed in (square.T, square[:3], square.reshape(2, 8), torch.cat([square, square])):
        assert changed.whole is None  # type: ignore[attr-defined]
    assert regions(square.T, 0, [(4, 4)] * 4)[0].axes == (1, 0)  # type: ignore[arg-type]
