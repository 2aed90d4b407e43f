"""The examples in the docstrings of the public names run, and print what they say."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import abliterate as ab
from abliterate.resources import demo_model_dir

FUNCTIONS = {
    **{name: getattr(ab, name) for name in ab.__all__ if inspect.isfunction(getattr(ab, name))},
    "plot.selection": ab.plot.selection,
    "plot.projections": ab.plot.projections,
}
# ``abliterate.writers`` is the package of that name, called as the function.
FUNCTIONS["writers"] = __import__("abliterate.api.writer_table", fromlist=["writers"]).writers


def test_examples_run_on_the_demo_model(tmp_path: Path) -> None:
    """One namespace for all, in the order of the work: what one example makes others use."""
    lm = ab.load(demo_model_dir(), device="cpu", dtype="float32")
    texts = {
        f"{kind}{suffix}": [p.text for p in ab.load_prompts(kind, split, n)]
        for kind in ("harmful", "harmless")
        for split, suffix, n in (("train", "", 16), ("val", "_val", 8))
    }
    space: dict[str, Any] = {"ab": ab, "M": str(demo_model_dir()), "lm": lm, "tmp": tmp_path}
    space |= texts
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)

    def run(name: str, documented: Any) -> None:
        example = parser.get_doctest(inspect.getdoc(documented) or "", space, name, None, 0)
        said: list[str] = []
        example.globs = space  # shared, not a copy
        failed = runner.run(example, out=said.append, clear_globs=False).failed
        assert not failed, "".join(said)

    run("extract", FUNCTIONS["extract"])
    run("select", FUNCTIONS["select"])
    space["d"] = space["sel"].direction
    run("orthogonalize", FUNCTIONS["orthogonalize"])
    done = {"extract", "select", "orthogonalize"}
    for name in sorted(FUNCTIONS.keys() - done):
        run(name, FUNCTIONS[name])
    run("Direction", ab.Direction)
    assert runner.summarize(verbose=False).attempted > 40
