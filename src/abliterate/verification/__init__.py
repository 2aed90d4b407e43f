"""verify: is an edited checkpoint clean, complete and otherwise its source? From the files alone.

``checks`` gives the verdict, ``declared_edit`` says what every tensor and file has to hold,
``edit_check`` compares one tensor with its source, ``stored_values`` reads both.
"""

from abliterate.verification.checks import (
    Verification,
    leak_bound,
    measure_leak,
    verify,
)
from abliterate.verification.edit_check import WriterCheck

__all__ = ["Verification", "WriterCheck", "leak_bound", "measure_leak", "verify"]
