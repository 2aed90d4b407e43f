"""What lies in ``inside/`` is a pytest run of its own: see ``test_emulated_accelerator.py``."""

import os

_ASKED = ("EMULATED_ACCELERATOR", "REAL_ACCELERATOR")

collect_ignore = [] if any(map(os.environ.get, _ASKED)) else ["inside"]
if os.environ.get("REAL_ACCELERATOR"):
    collect_ignore += ["test_emulated_accelerator.py", "test_emulated_check.py"]
