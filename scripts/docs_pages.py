"""Hook of mkdocs: pages that are made while building, so that none goes stale.

The CLI reference comes from the commands' own options, the notebook from ``examples/``, and
contributing and the changelog from the top of the repository.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        if (there := files.get_file_from_path(name)) is not None:
            files.remove(there)
        files.append(File.generated(config, name, content=text))
    return files


def pages() -> dict[str, str]:
    """Markdown by path below ``docs/``."""
    return {
        "reference/cli.md": cli_reference(),
        "notebook.md": notebook_page(ROOT / "examples" / "quickstart.ipynb"),
        "contributing.md": _from_top("CONTRIBUTING.md"),
        "changelog.md": _from_top("CHANGELOG.md"),
    }


def _from_top(name: str) -> str:
    """A file of the top folder, whose links into ``docs/`` are this folder's."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


def cli_reference() -> str:
    """Every command with its arguments and options."""
    import typer.main

    from abliterate.cli.app import app

    group: Any = typer.main.get_command(app)
    lines = [
        "# CLI reference",
        "",
        "Made from the options themselves: `abliterate COMMAND -h`.",
        "",
    ]
    for name, command in sorted(group.commands.items()):
        words = " ".join(
            parameter.name.upper()
            for parameter in command.params
            if parameter.param_type_name == "argument"
        )
        lines += [f"## {name}", "", _escaped(command.help or ""), ""]
        lines += ["```sh", f"abliterate {name} {words} [OPTIONS]".replace("  ", " "), "```", ""]
        lines += ["| option | what | default |", "|---|---|---|"]
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                lines.append(_row(parameter))
        lines.append("")
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper()}`"
    else:
        spelled = [*parameter.opts, *parameter.secondary_opts]
        names = ", ".join(f"`{name}`" for name in spelled)
    default = parameter.default
    shown = "" if default in (None, False, ()) or callable(default) else f"`{default}`"
    return f"| {names} | {_escaped(getattr(parameter, 'help', None) or '')} | {shown} |"


def _escaped(text: str) -> str:
    """Help on one line, in which nothing is a cell's end, a tag or a link."""
    flat = " ".join(text.split())
    flat = re.sub(r"([|<>\[\]*_])", r"\\\1", flat)
    return flat.replace("\\<", "&lt;").replace("\\>", "&gt;")


def notebook_page(path: Path) -> str:
    """A notebook's cells and what they printed, as Markdown."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if output.get("name") == "stdout":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            elif "application/vnd.plotly.v1+json" in data:
                title = data["application/vnd.plotly.v1+json"]["layout"]["title"]["text"]
                parts.append(f"*(figure: {title}; run the notebook to see it)*")
            elif "text/plain" in data:
                parts.append(f"```text\n{''.join(data['text/plain'])}\n```")
    parts.append("This page is `examples/quickstart.ipynb`.")
    return "\n\n".join(parts) + "\n"
