"""Names of a model's modules and parameters, some of which have several."""

from __future__ import annotations

from torch import nn


def parameter_aliases(model: nn.Module) -> dict[str, str]:
    """The name in ``named_parameters()`` for each name under which a parameter is known."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in everywhere}


def module_name(model: nn.Module, module: nn.Module) -> str:
    """The name of a module of the model."""
    name: str = next(name for name, each in model.named_modules() if each is module)
    return name
