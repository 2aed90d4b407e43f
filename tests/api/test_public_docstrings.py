"""Every public function says what it takes and raises, what it stands on, and shows an example."""

from __future__ import annotations

import ast
import doctest
import inspect
from pathlib import Path

import pytest

import abliterate

_ROOT = Path(abliterate.__file__).parent
_FUNCTIONS = {
    node.name: node
    for name, home in abliterate._HOME.items()
    for node in ast.parse(_ROOT.joinpath(f"{(home or name).replace('.', '/')}.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and (node.name == name or name == "plot")
}


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_public_functions_are_documented(name: str) -> None:
    node = _FUNCTIONS[name]
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    wanted = ["Args:", "Source:", "Examples:", *([] if name == "set_progress" else ["Raises:"])]
    assert [section for section in wanted if f"\n{section}\n" not in text] == []
    for parameter in (*node.args.args, *node.args.kwonlyargs):
        assert f"\n    {parameter.arg}: " in text, parameter.arg
    assert doctest.DocTestParser().get_examples(text)
