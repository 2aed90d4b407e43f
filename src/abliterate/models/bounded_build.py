"""An end to building a model whose configuration asks for more than there can be.

Every module of a model registers its parameters, in whatever loop an architecture's constructor
makes them: torch calls a hook each time, and this one stops the building once there are too many or
they are too large. On the meta device nothing has been allocated by then.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from abliterate.checkpoints.config_sizes import LENGTH, NUMBERS, TENSORS


class TooLargeError(Exception):
    """A model that is being built has too many parameters."""


@contextmanager
def bounded_build(elements: int = NUMBERS, tensors: int = TENSORS) -> Iterator[None]:
    """Within the context no model is built that is larger.

    Args:
        elements: numbers of all its parameters on the meta device; those tied later count twice.
        tensors: how many parameters those are.

    Raises:
        TooLargeError: one is.
    """
    total, count, thread = 0, 0, threading.get_ident()

    def hook(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal total, count
        # Weights that are loaded take the place of those that were counted.
        if parameter is None or not parameter.is_meta or threading.get_ident() != thread:
            return
        total, count = total + parameter.numel(), count + 1
        if max(parameter.shape, default=0) > LENGTH:
            raise TooLargeError(f"parameters of more than {LENGTH:,} rows or columns")
        if total > elements:
            raise TooLargeError(f"more than {elements:,} numbers")
        if count > tensors:
            raise TooLargeError(f"more than {tensors:,} parameters")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
