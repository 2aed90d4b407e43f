"""The texts of a paper as Markdown and LaTeX; what strangers wrote is escaped for either."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from abliterate.console import safe
from abliterate.report.methods import BIBTEX, CITE, KEY, Methods

#: What an earlier output begins with, by which it is known to be ours.
MARKS = {"md": "<!-- made by abliterate methods -->", "latex": "% made by abliterate methods"}
_CITED = {
    "md": "([Arditi et al., 2024](https://arxiv.org/abs/2406.11717))",
    "latex": rf"\cite{{{KEY}}}",
}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]#|~$!])")
_LIGATURES = re.compile(r"(?<=-)(?=-)|(?<=,)(?=,)")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "_": r"\_", "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}", '"': r"\textquotedbl{}",
    "\N{EN DASH}": "--", "\N{EM DASH}": "---", "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{GREEK CAPITAL LETTER DELTA}": r"$\Delta$", "\N{RIGHTWARDS ARROW}": r"$\rightarrow$",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
}  # fmt: skip


def markdown(text: object) -> str:
    """Plain text as Markdown shows it: no markup, no HTML, no link."""
    shown = (
        safe(text)
        .replace(CITE, " ")
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
    )
    shown = _MARKDOWN.sub(r"\\\1", shown)
    return shown.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def latex(text: object) -> str:
    """Plain text as LaTeX sets it; letters that it cannot set without packages by their number."""
    plain = safe(text).replace(CITE, " ")
    # Two dashes or commas in a row would be set as another sign.
    pieces = _LIGATURES.split(plain)
    return "{}".join("".join(map(_latex_character, piece)) for piece in pieces)


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    code = ord(character)
    # What inputenc's UTF-8 knows of itself: ASCII and the letters of Latin-1.
    if code < 128 or (0xC0 <= code < 0x100):
        return character
    return rf"\texttt{{U+{code:04X}}}"


def render(methods: Methods, form: str) -> str:
    """The whole text in ``md`` or ``latex``, with the entry for the bibliography."""
    return {"md": _markdown_text, "latex": _latex_text}[form](methods)


def is_methods(path: Path) -> bool:
    """Whether a file is an earlier output."""
    head = path.read_bytes()[:200]
    return any(head.startswith(mark.encode()) for mark in MARKS.values())


def _paragraph(methods: Methods, form: str, escape: Callable[[object], str]) -> str:
    said = []
    for sentence in methods.sentences:
        # A stranger's text may hold the sign of the citation; only the first one is ours.
        before, cited, behind = sentence.partition(CITE)
        said.append(escape(before) + (_CITED[form] if cited else "") + escape(behind))
    return " ".join(f"{sentence}." for sentence in said)


def _markdown_text(methods: Methods) -> str:
    parts = [MARKS["md"], "## Methods", _paragraph(methods, "md", markdown)]
    parts.append(_markdown_table(["setting", "value"], methods.settings))
    for title, table in (
        ("Results", methods.results),
        ("By test set", methods.sets),
        ("Controls", methods.controls),
    ):
        if table is not None:
            parts += [f"### {title}", _markdown_table(*table)]
    if methods.left_out:
        lines = [f"- {markdown(sentence)}" for sentence in methods.left_out]
        parts.append("Left out, as it is stale:\n\n" + "\n".join(lines))
    parts.append(f"```bibtex\n{BIBTEX}```")
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns)]
    cells = [[cell if cell == "---" else markdown(cell) for cell in line] for line in lines]
    cells += [[markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _latex_text(methods: Methods) -> str:
    parts = [MARKS["latex"], _paragraph(methods, "latex", latex)]
    wide = r"p{0.26\linewidth}p{0.66\linewidth}"
    parts.append(_latex_table("Settings", wide, ["setting", "value"], methods.settings))
    for title, table in (("Results on test prompts", methods.results),
                         ("By test set", methods.sets),
                         ("Controls", methods.controls)):  # fmt: skip
        if table is not None:
            # Many columns: each intervention is a row of names and values.
            rows = [
                (row[0] if number == 1 else "", column, row[number])
                for row in table[1]
                for number, column in enumerate(table[0])
                if number
            ]
            form = r"p{0.18\linewidth}p{0.28\linewidth}p{0.44\linewidth}"
            parts.append(_latex_table(title, form, [table[0][0], "measure", "value"], rows))
    if methods.left_out:
        told = "; ".join(latex(sentence) for sentence in methods.left_out)
        parts.append(rf"\emph{{Left out, as it is stale: {told}.}}")
    entry = "".join(f"% {line}\n" for line in BIBTEX.splitlines())
    parts.append(f"% For the bibliography:\n{entry}")
    return "\n\n".join(parts)


def _latex_table(
    title: str, form: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    lines = [" & ".join(map(latex, row)) + r" \\" for row in [columns, *rows]]
    return "\n".join(
        [
            r"\begin{table}[ht]",
            r"\centering\small\raggedright",
            rf"\caption{{{latex(title)}}}",
            rf"\begin{{tabular}}{{{form}}}",
            r"\hline",
            lines[0],
            r"\hline",
            *lines[1:],
            r"\hline",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )
