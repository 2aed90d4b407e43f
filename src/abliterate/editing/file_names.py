"""What the files are called that an edit adds to a checkpoint."""

from __future__ import annotations

#: Every edited tensor, before and after; the model card.
RECORD, CARD = "abliterate.json", "README.md"
