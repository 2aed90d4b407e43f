"""Writers that are compared with each other: pools of units, and the groups an edit may hide in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abliterate.auditing.components import AuditedComponent
from abliterate.auditing.soft_null_space import is_wide, storage

MIN_POOLS = 4
# What is kept of all pools, and the work on them that still takes minutes on two cores.
_MOST_BYTES, _MOST_FLOPS = 2.1e9, 4e13
_FLOPS = 5  # of one pool, about, as a multiple of the cube of the width
_MIN_WIDE_POOLS = 12  # in a wide model: two of each kind in each third of the depth


@dataclass(frozen=True)
class ComponentPool:
    """Units whose grams are added up: one each, or neighbouring layers in a wide model."""

    kind: str
    layers: tuple[int | None, ...]
    units: tuple[AuditedComponent, ...]


def make_pools(
    units: Sequence[AuditedComponent], width: int, few: bool = False
) -> list[ComponentPool]:
    """One pool for each unit, or as few for each kind as memory and time allow.

    Args:
        units: what is compared.
        width: d_model.
        few: a wide model's units go into as few pools as can be compared.
    """
    room = _MOST_BYTES / (width**2 * storage(width).itemsize)
    max_pools = int(max(_MIN_WIDE_POOLS, min(room, _MOST_FLOPS / (_FLOPS * width**3))))
    if few and is_wide(width):
        max_pools = _MIN_WIDE_POOLS
    if len(units) <= max_pools:
        return [ComponentPool(u.kind, (u.layer,), (u,)) for u in units]
    kinds = dict.fromkeys(u.kind for u in units)
    pools = []
    for kind in kinds:
        of_kind = [u for u in units if u.kind == kind]
        number = max(1, min(len(of_kind), round(max_pools * len(of_kind) / len(units))))
        if 1 < number < len(of_kind):  # so that none reaches over the thirds of the depth by much
            number = min(len(of_kind), 3 * max(1, round(number / 3)))
        for index in range(number):
            chunk = of_kind[len(of_kind) * index // number : len(of_kind) * (index + 1) // number]
            pools.append(ComponentPool(kind, tuple(u.layer for u in chunk), tuple(chunk)))
    return pools


def groups_of(pools: Sequence[ComponentPool]) -> dict[str, list[int]]:
    """The groups of pools in which an edit may hide: all, by kind, by third of the depth."""
    every = range(len(pools))
    kinds = {"attention": ("attention", "mixer"), "mlp": ("mlp", "expert")}
    layers = [layer for pool in pools for layer in pool.layers if layer is not None]
    depth = max(layers, default=-1) + 1
    inner = [i for i in every if pools[i].layers[0] is not None]
    groups = {"all": list(every), "blocks": inner}
    groups |= {
        n: [i for i in inner if pools[i].kind.removesuffix(" readers") in kinds[n]] for n in kinds
    }
    for index, name in enumerate(("first third", "middle third", "last third")):
        low, high = depth * index / 3, depth * (index + 1) / 3
        groups[name] = [i for i in inner if low <= _middle(pools[i]) + 0.5 <= high]
    unique = {tuple(chosen): name for name, chosen in reversed(groups.items())}
    return {
        name: chosen
        for name, chosen in groups.items()
        if len(chosen) >= MIN_POOLS and unique[tuple(chosen)] == name
    }


def _middle(pool: ComponentPool) -> float:
    inside = [layer for layer in pool.layers if layer is not None]
    return sum(inside) / len(inside)


def halves_of(
    pools: Sequence[ComponentPool], chosen: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """A group's pools, and which half each is in: by turns within each kind, so that each half has
    its share of all depths and kinds."""
    kinds = dict.fromkeys(pools[i].kind for i in chosen)
    ordered = [i for kind in kinds for i in chosen if pools[i].kind == kind]
    return ordered, [position % 2 == 1 for position in range(len(ordered))]
