"""Names that Windows cannot give to a file, or takes for something else.

``NUL`` is no file there, nor is ``aux.txt``; ``a:b`` is a hidden stream of the file ``a``; a dot or
space at the end is dropped in silence. A path of the user's is checked there alone; a name out of
an index that becomes a file's must do on every system.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath

from abliterate.errors import UsageError

_FORBIDDEN = re.compile(r'[<>:"|?*\\/\x00-\x1f]')
_DEVICE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9\u00b9\u00b2\u00b3])\s*(\..*)?",
    re.IGNORECASE | re.DOTALL,
)


def is_windows() -> bool:
    """Whether paths follow the rules of Windows."""
    return os.name == "nt"


def is_portable(name: str) -> bool:
    """Whether ``name`` can be a file's on every system, and means that file."""
    return not (_FORBIDDEN.search(name) or name.endswith((".", " ")) or _DEVICE.fullmatch(name))


def check_output_path(path: Path) -> None:
    """Refuse an output that Windows could not make under that name; elsewhere names are free.

    Raises:
        UsageError: this is Windows, and a part of the path is no name there.
    """
    if not is_windows():
        return
    whole = PureWindowsPath(str(path))
    parts = whole.parts[1:] if whole.anchor else whole.parts  # the drive has its colon
    if whole.drive and not whole.root:
        raise UsageError(
            f"output {path} is relative to wherever drive {whole.drive} stands: write "
            f"{whole.drive}\\{whole.relative_to(whole.drive)} or leave the drive out"
        )
    for part in parts:
        if part not in (".", "..") and not is_portable(part):
            raise UsageError(
                f"output {path}: Windows can have no file '{part}' (it keeps CON, NUL, AUX and the "
                'like, <>:"|?* and names that end in a dot or space): choose another name'
            )
