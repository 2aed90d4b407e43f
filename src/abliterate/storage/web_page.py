"""What the HTML files that we write may do: run the scripts that we put there, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from abliterate.storage.artifacts import finite


def content_policy(scripts: Iterable[str]) -> str:
    """A content security policy: these scripts by their hashes, our styles, pictures made in the
    page, no request to anywhere."""
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )


def script_json(document: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(finite(document), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
