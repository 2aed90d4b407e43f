"""Which hooks of a model's modules may be replayed from recorded kernels, without their Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import modules

_MARK = "abliterate_replayable"


def replayable(hook: Callable[..., Any], holds: bool = True) -> Callable[..., Any]:
    """Mark a hook as one that only computes, from its second call with tensors that stay in place.

    Args:
        hook: a module's.
        holds: whether it is one for the time being.
    """
    setattr(hook, _MARK, holds)
    return hook


def all_replayable(model: nn.Module) -> bool:
    """Whether ``model`` has no other hooks: those of users, which may keep what they see, say."""
    if modules.module._global_forward_hooks or modules.module._global_forward_pre_hooks:
        return False
    for module in model.modules():
        # A forward of an instance's own: accelerate's, which moves tensors, or anybody's.
        if hasattr(module, "_hf_hook") or "forward" in vars(module):
            return False
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            # The library's own wait for outputs to be asked for, which answers do not.
            library = str(hook.__module__).startswith("transformers.")
            if not library and not getattr(hook, _MARK, False):
                return False
    return True
