"""Names that Windows cannot give, or gives to something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from abliterate.errors import UsageError
from abliterate.storage import portable_names
from abliterate.storage.portable_names import check_output_path, is_portable

BAD = ["CON", "nul", "aux.txt", "Com1.safetensors", "LPT9", "prn .json", "CONIN$", "a:b", "a?b",
       "a*", 'a"b', "<a", "a|b", "a>b", "a.", "a ", "a\\b", "a/b", "a\x01"]  # fmt: skip
GOOD = ["model", "com", "com0", "com10", "console", "aux-1.txt", "nul_", ".hidden", "a b", "käse",
        "model-00001-of-00002.safetensors", "lpt"]  # fmt: skip


def test_names_are_judged_as_windows_does() -> None:
    assert [name for name in BAD if is_portable(name)] == []
    assert [name for name in GOOD if not is_portable(name)] == []


@pytest.fixture
def on_windows(monkeypatch) -> None:
    monkeypatch.setattr(portable_names, "is_windows", lambda: True)


@pytest.mark.usefixtures("on_windows")
def test_paths_with_drives_are_paths() -> None:
    for good in (r"C:\models\out", r"D:/out", r"\\server\share\out", "out", r"..\out", r".\out"):
        check_output_path(Path(good))
    for bad in (r"C:\models\nul", r"C:\con\out", r"out\a?b", "out.", r"C:\a:b", "aux.json"):
        with pytest.raises(UsageError, match="choose another name"):
            check_output_path(Path(bad))
    with pytest.raises(UsageError, match="is relative to wherever drive C: stands"):
        check_output_path(Path("C:out"))


@pytest.mark.parametrize("name", ["NUL", "aux.d", "a:b", "out."])
def test_outputs_are_refused_before_any_work_on_windows_alone(
    name: str, tiny, cli, fails, tmp_path: Path, monkeypatch
) -> None:
    model, place = tiny("llama"), tmp_path / name
    commands = (
        ("extract", model, "-o", place),
        ("orthogonalize", model, "--direction", tmp_path / "d.safetensors", "-o", place),
    )
    import torch
    from safetensors.torch import save_file

    save_file({"direction": torch.ones(48)}, tmp_path / "d.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(portable_names, "is_windows", lambda: True)
        for command in commands:
            line = fails(*command, code=2)
            assert f"Windows can have no file '{name}'" in line
        assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors"]
    assert cli(*commands[1]).code == 0


@pytest.mark.parametrize("name", ["CON.safetensors", "nul.x.safetensors", "a?.safetensors"])
def test_an_index_names_only_what_is_a_file_everywhere(
    name: str, tiny, fails, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny("llama", True), tmp_path / "source"))
    index = source / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    old = min(document["weight_map"].values())
    (source / old).rename(source / name)
    renamed = {k: name if v == old else v for k, v in document["weight_map"].items()}
    index.write_text(json.dumps({**document, "weight_map": renamed}))
    line = fails("writers", source, code=4)
    assert "no plain file name" in line
