"""Show figures and tables in a notebook, each with its caption and what the report needs of it."""

from __future__ import annotations

import base64
import html
import io
import re
import textwrap
import unicodedata
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from kdutils.results.tables import NUMBER, as_text, is_right
from kdutils.settings import UserError

_NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
_NAMED |= {'"': "quotedbl", "`": "asciigrave"}
_SPECIAL = {c: f"\\{c}" for c in "{}$&%#_"} | {c: rf"\text{name}{{}}" for c, name in _NAMED.items()}
_GREEK_AND_MATH = r"""
α \alpha β \beta γ \gamma δ \delta ε \epsilon ζ \zeta η \eta θ \theta ι \iota κ \kappa λ \lambda μ \mu ν \nu
ξ \xi π \pi ρ \rho σ \sigma τ \tau υ \upsilon φ \phi χ \chi ψ \psi ω \omega Γ \Gamma Δ \Delta Θ \Theta
Λ \Lambda Π \Pi Σ \Sigma Φ \Phi Ψ \Psi Ω \Omega − - → \rightarrow ← \leftarrow √ \surd ≈ \approx ≤ \leq ≥ \geq
≠ \neq ∞ \infty ∈ \in
""".split()
_MATH = dict(zip(_GREEK_AND_MATH[::2], _GREEK_AND_MATH[1::2], strict=True))


def beyond_ascii(match: re.Match) -> str:
    """The one character of a match, as LaTeX that prints it or, where pdfLaTeX has no glyph, names its code point."""
    character = match.group()
    if character in _MATH:
        return rf"\ensuremath{{{_MATH[character]}}}"
    if character in "–—…‘’“”•" or ("¡" <= character <= "ž" and character not in "ĦħĸĿŀŉŦŧ\u00ad"):
        return character  # the T1 and TS1 fonts have these
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    if plain.isalnum() or plain == " " or unicodedata.category(character)[0] in "MC":
        return plain
    return f"[U+{ord(character):04X}]"


def tex(text: Any) -> str:
    """Any text as LaTeX that prints that text; what pdfLaTeX has no glyph for appears as its code point."""
    text = unicodedata.normalize("NFC", " ".join(str(text).split()))
    text = "".join(_SPECIAL.get(character, character) for character in text).replace("--", "-{}-")
    text = re.sub(r"\b(\w) = (?=\d)", r"\1~=~", text)  # n = 5 stays on one line
    return re.sub(r"[^\x20-\x7e]", beyond_ascii, text).replace(" ± ", "~±~").replace(r" \%", r"~\%")


# --- in a notebook ---


def _shown(kind: str, name: str, caption: str, note: str, bundle: dict[str, str]) -> None:
    caption = f"{caption} {note}".strip()
    about = {"kind": kind, "name": name, "caption": caption}
    display(bundle | {"text/plain": caption}, raw=True, metadata={"kdutils": about})


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9-]+", name):
        raise UserError(f"name: {name!r} is not valid; use only a-z, 0-9 and -, such as curves-scratch")


def show_figure(fig: Figure, name: str, caption: str, note: str = "") -> None:
    """Show a figure with its caption and close it; in the report it is the float `fig:<name>`.

    The output holds a PNG with the caption under it, and a vector PDF whose bytes depend on the figure alone.
    `note` is appended to the caption. Raises `UserError` for a name with other characters than a-z, 0-9 and -.
    """
    _check_name(name)
    pdf, png = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        fig.savefig(pdf, format="pdf", bbox_inches="tight", pad_inches=0.02, metadata={"CreationDate": None})
    fig.set_layout_engine("none")  # the PNG keeps the PDF's layout; legends would move to the picture's edge
    for legend in fig.legends:
        place = legend.get_bbox_to_anchor().transformed(fig.transFigure.inverted())
        legend.set_bbox_to_anchor(place, fig.transFigure)
    lines = textwrap.fill(f"{caption} {note}".strip(), width=max(40, round(15 * fig.get_figwidth())))
    below = min(0, fig.get_tightbbox().y0) / fig.get_figheight()  # something may stick out of the figure
    fig.text(0.01, below - 0.02, lines, va="top", fontsize=9, color="0.25", parse_math=False)
    fig.savefig(png, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(fig)
    made = {"image/png": png, "application/pdf": pdf}
    bundle = {kind: base64.b64encode(file.getvalue()).decode() for kind, file in made.items()}
    _shown("figure", name, caption, note, bundle)


def show_table(frame: pd.DataFrame, name: str, caption: str, note: str = "") -> None:
    """Show a table with its caption; in the report it is the float `tab:<name>`.

    Floats have three decimals, whole numbers a comma for thousands, missing values a dash; an index other than
    0, 1, 2, ... becomes the first column. `note` and `name` are as in `show_figure`.
    """
    _check_name(name)
    texts = as_text(frame)
    heading = f"<p>{html.escape(f'{caption} {note}'.strip())}</p>"  # a <caption> is no wider than its table
    _shown("table", name, caption, note, {"text/html": heading + _html(texts), "text/latex": _tabular(texts)})


def _html(texts: pd.DataFrame) -> str:
    """The table for a notebook. Every cell names its side, because JupyterLab aligns all others to the right."""
    sides = ["right" if is_right(column) else "left" for _, column in texts.items()]
    lines: list[tuple[str, list[str]]] = [("th", list(texts.columns)), *(("td", row) for row in texts.values.tolist())]
    rows = [
        "".join(f"<{tag} style='text-align:{side}'>{html.escape(text)}</{tag}>" for side, text in zip(sides, row))
        for tag, row in lines
    ]
    head, *body = (f"<tr>{row}</tr>\n" for row in rows)
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>"


def _tabular(texts: pd.DataFrame) -> str:
    kinds, cells = [], []
    for _, column in texts.items():
        numbers = [number for number in map(NUMBER.fullmatch, column) if number]
        kinds.append("r" if is_right(column) else "l")
        if kinds[-1] == "l" and max(map(len, column), default=0) > 60:
            kinds[-1] = r"p{0.42\linewidth}"
        is_number = len(numbers) == len(column)
        cells.append(_on_the_point(numbers) if is_number else [tex(text) for text in column])
    frame = pd.DataFrame(list(zip(*cells, strict=True)), columns=[tex(name) for name in texts.columns], dtype=object)
    return frame.to_latex(index=False, escape=False, column_format="".join(kinds))


def _on_the_point(numbers: list[re.Match]) -> list[str]:
    """Numbers as LaTeX, padded so that decimal points align in a right-aligned column, those of deviations too."""
    parts = [{name: text or "" for name, text in number.groupdict().items()} for number in numbers]
    longest = {name: max((part[name] for part in parts), key=len) for name in (parts[0] if parts else ())}
    lines = []
    for part in parts:
        missing = {name: longest[name][len(text) :] for name, text in part.items()}
        pad = {name: rf"\phantom{{{tex(text)}}}" if text else "" for name, text in missing.items()}
        line = tex(part["whole"] + part["fraction"] + part["unit"]) + pad["fraction"] + pad["unit"]
        if part["sd_whole"]:
            line += f"~±~{pad['sd_whole']}{part['sd_whole']}{part['sd_fraction']}{pad['sd_fraction']}"
        elif longest["sd_whole"]:
            line += rf"\phantom{{~±~{longest['sd_whole']}{longest['sd_fraction']}}}"
        lines.append(line)
    return lines
