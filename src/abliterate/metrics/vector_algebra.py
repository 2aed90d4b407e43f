"""Arithmetic of a vector that knows where it came from, and how it is shown."""

from __future__ import annotations

import html
import math
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

from abliterate.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_OF_VALUES = {"sha256": None}


class VectorAlgebra:
    """What a frozen dataclass with a ``vector`` can do beside holding it.

    Results keep the position, layer and model of what they were computed from, and lose the hash
    of its file, which holds other values.
    """

    vector: Tensor
    position: int | None
    layer: int | None
    model: str | None

    @property
    def norm(self) -> float:
        """Length of the vector."""
        return float(self.vector.double().norm())

    @property
    def unit(self) -> Self:
        """The same direction with length 1: ``r`` of the paper (section 2.3).

        Raises:
            InputError: the vector is zero or not finite.
        """
        norm = self.norm
        if norm == 0 or not math.isfinite(norm):
            raise InputError("the direction is zero or not finite: it has no unit vector")
        return self._with(self.vector.double() / norm)

    def cosine(self, other: Any) -> float:
        """Cosine of the angle with another direction or vector ``[d_model]``, -1 to 1.

        Raises:
            InputError: the other is no vector of this size, or one of the two is zero.
        """
        mine, theirs = self.vector.double(), _values_of(other, len(self.vector))
        length = float(mine.norm() * theirs.norm())
        if length == 0 or not math.isfinite(length):
            raise InputError("a direction that is zero or not finite has no cosine")
        return max(-1.0, min(1.0, float(mine @ theirs) / length))

    # A product with a number of numpy's is a direction, too.
    __array_ufunc__ = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy

        return numpy.array(self.numpy(), dtype=dtype)

    def numpy(self) -> Any:
        """The vector as a numpy array, float64 ``[d_model]``."""
        return self.vector.double().numpy()

    def __neg__(self) -> Self:
        return self._with(-self.vector)

    def __mul__(self, factor: float) -> Self:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        if not math.isfinite(factor):
            raise UsageError(f"a direction can be multiplied by a finite number, not by {factor}")
        scaled: Self = self._with(self.vector * factor)
        return scaled

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> Self:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        if factor == 0:
            raise UsageError("a direction cannot be divided by zero")
        return self._with(self.vector / factor)

    def __add__(self, other: Any) -> Self:
        summed = self.vector.double() + _values_of(other, len(self.vector))
        shared = {
            name: None
            for name in ("position", "layer", "model")
            if getattr(self, name) != getattr(other, name, None)
        }
        joined: Self = replace(self, vector=summed, **shared, **_OF_VALUES)  # type: ignore[type-var]
        return joined

    def __sub__(self, other: Any) -> Self:
        difference: Self = self + -other
        return difference

    def _with(self, vector: Tensor) -> Self:
        moved: Self = replace(self, vector=vector, **_OF_VALUES)  # type: ignore[type-var]
        return moved

    def _facts(self) -> list[str]:
        place = [
            f"{name} {value}"
            for name, value in (("position", self.position), ("layer", self.layer))
            if value is not None
        ]
        size = tuple(getattr(self.vector, "shape", ()))
        named = [] if self.model is None else [f"of {self.model!r}"]
        return [*place, f"norm {self.norm:.4g}", f"d_model {size[-1] if size else '?'}", *named]

    def __repr__(self) -> str:
        name = next(kind.__name__ for kind in type(self).__mro__ if kind.__name__[0] != "_")
        try:
            return f"{name}({', '.join(self._facts())})"
        except (AttributeError, TypeError, RuntimeError):  # what holds no vector is shown too
            return f"{name}({type(self.vector).__name__})"

    def _repr_html_(self) -> str:
        facts = "".join(f"<li>{html.escape(fact)}</li>" for fact in self._facts())
        return f"<b>{type(self).__name__}</b><ul>{facts}</ul>"


def _values_of(given: Any, size: int) -> Tensor:
    """The other operand as float64 ``[d_model]``."""
    import torch

    try:
        values = torch.as_tensor(getattr(given, "vector", given)).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"the other must be a direction or a vector [d_model], not a {type(given).__name__}"
        ) from None
    if values.ndim != 1:
        raise InputError(
            f"the other must be a direction or a vector [{size}], not of shape {list(values.shape)}"
        )
    if tuple(values.shape) != (size,):
        raise InputError(
            f"the directions do not fit: [{size}] and {list(values.shape)} are of different models"
        )
    return values
