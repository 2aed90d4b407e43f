"""verify: is an edited checkpoint clean, complete and otherwise its source? From the files alone.

``checks`` gives the verdict, ``declared_edit`` says what every tensor and file has to hold,
``edit_check`` compares one tensor with its source, ``stored_values`` reads both, and
``hook_distance`` compares the logits with those of ablation's hooks. Uses ``editing`` and
``checkpoints``, and ``inference`` for the logits.
"""

from abliterate.verification.checks import (
    Verification,
    leak_bound,
    measure_leak,
    verify,
)
from abliterate.verification.edit_check import WriterCheck
from abliterate.verification.hook_distance import HookDistance, hook_distance, hooks_of

__all__ = [
    "HookDistance",
    "Verification",
    "WriterCheck",
    "hook_distance",
    "hooks_of",
    "leak_bound",
    "measure_leak",
    "verify",
]
