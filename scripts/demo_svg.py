"""Draw what ``abliterate demo`` prints as an SVG, for the README.

    python scripts/demo_svg.py [docs/demo.svg]

The command is run in an empty folder, and its output is drawn as it came, by rich.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the demo and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "demo.svg")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as empty:
        demo = [sys.executable, "-m", "abliterate", "demo"]
        done = subprocess.run(demo, cwd=empty, capture_output=True, text=True, check=True)
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ abliterate demo", style="bold"))
    console.print(Text(done.stdout.rstrip()))
    out.write_text(console.export_svg(title="abliterate", unique_id="demo"))


if __name__ == "__main__":
    main()
