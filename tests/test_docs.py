"""The documentation builds without a broken link, and its CLI reference has every option."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_a_broken_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.chdir(ROOT)
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    pages = {path.parent.name: path.read_text("utf-8") for path in tmp_path.rglob("index.html")}
    assert 'id="abliterate.api.directions.extract"' in pages["api"]
    assert "abliterate.api.edits.OrthogonalizedModel.restore" in pages["api"]
    assert "--refusal-token" in pages["cli"]
    assert "quickstart.ipynb" in pages["notebook"]


def test_the_cli_reference_has_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer.main

    from abliterate.cli.app import app

    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import docs_pages

    text = docs_pages.cli_reference()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            assert all(f"`{option}`" in section for option in parameter.opts if option[0] == "-")
    sys.modules.pop("docs_pages", None)


def test_links_and_pictures_of_the_readme_lead_to_files() -> None:
    """They are relative, so that they work in a checkout and in the source distribution."""
    text = (ROOT / "README.md").read_text("utf-8")
    found = [place.partition("#")[0] for place in re.findall(r"\]\(([^)\s]+)\)", text)]
    inside = [place for place in found if not place.startswith(("https://", "http://"))]
    assert {"docs/demo.svg", "docs/report.png"} <= set(inside)
    assert [place for place in inside if place and not (ROOT / place).is_file()] == []
    picture = (ROOT / "docs" / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000


@pytest.mark.parametrize("url", ["", "https://example.org/blob/v1/"])
def test_a_package_index_shows_no_link_that_leads_nowhere(url: str) -> None:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text("utf-8")
    shown = module.for_an_index(text, url)
    left = re.findall(r"\]\(([^)\s]+)\)", shown)
    assert left
    assert [place for place in left if not place.startswith("https://")] == []
    assert "are relative" not in shown
    if url:
        assert shown.count("](") == text.count("](")
        assert "![What abliterate demo prints](https://example.org/blob/v1/docs/demo.svg)" in shown
    else:
        assert "![" not in shown
        assert "A real model (docs/real-model.md)" in shown
        assert "are in docs/editor.md." in " ".join(shown.split())
