"""Controls as people read them: the selected direction among directions that mean nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abliterate.console import print_line, print_table
from abliterate.metrics.spread import place_text

_FIGURES = {
    "harmful_score": "harmful log-odds",
    "harmless_score": "harmless log-odds",
    "kl_divergence": "harmless KL (nats)",
}
_FAMILIES = {
    "covariance": "random, covariance of the activations",
    "isotropic": "random, isotropic",
    "layers": "candidates of other layers",
}


def show_controls(controls: Mapping[str, Any] | None) -> None:
    """Print the controls of a record: a row for the selected direction and for each family."""
    if not controls:
        return
    rows, sentences = [], []
    for name, held in controls["rows"].items():
        rows.append([name, "selected", *(_number(held["selected"][figure]) for figure in _FIGURES)])
        for family, of_family in held["families"].items():
            count = len(of_family["members"])
            rows.append(
                [
                    name,
                    f"{_FAMILIES[family]} ({count})",
                    *(_range(of_family["members"], figure) for figure in _FIGURES),
                ]
            )
        sentences += [
            f"{name}, {title}: the selected direction lies {place}"
            for title, place in places(held["families"]).items()
        ]
    print_table(
        "Controls: other directions, first-token scores (mean, least to largest)",
        ["row", "direction", *_FIGURES.values()],
        rows,
        left=2,
    )
    for sentence in sentences:
        print_line(sentence)


def places(families: Mapping[str, Any]) -> dict[str, str]:
    """By figure, where the selected direction lies among the random ones of each family."""
    random = {name: held["place"] for name, held in families.items() if name != "layers"}
    return {
        title: ", ".join(f"{place_text(place[figure])} {name}" for name, place in random.items())
        for figure, title in _FIGURES.items()
    }


def _range(members: list[Mapping[str, Any]], figure: str) -> str:
    values = [member[figure] for member in members]
    if any(value is None for value in values):
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return _number(mean)
    return f"{_number(mean)} ({_number(min(values))} to {_number(max(values))})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:z.3f}"
