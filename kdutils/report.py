"""From what notebooks show to a LaTeX report: figures, tables, the exporter, the prose's numbers, the PDF.

nbformat and nbconvert take seconds to import and only the exporter needs them, so it imports them itself.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import re
import shutil
import subprocess
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from kdutils import metrics
from kdutils.results import LONG, at_budget
from kdutils.runs import write_atomically, write_text
from kdutils.settings import ARCHITECTURES, ROOT, UserError, counted, shown_path

if TYPE_CHECKING:
    import nbformat

REPORT = ROOT / "report"
TEX_COMMAND = "sudo apt-get install latexmk texlive-latex-extra lmodern"


class LatexMissing(UserError):
    """There is no LaTeX here to typeset the report with."""


RULE_OF_NAMES = "a name is made of a-z, 0-9 and -, such as curves-scratch"

SELECTION = ("pretraining-", "sweep-", "map-")  # names of floats about how settings were chosen

WORDS = {
    "adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "one_cycle": "one-cycle",
    "resnet18": "ResNet-18", "resnet50": "ResNet-50", "student": "another student",
    "last_layer": "the last layer", "last_block": "the last block and the last layer",
    "all": "the whole network",
}  # fmt: skip
ARMS = {
    "scratch": "student from scratch", "kd": "student distilled from one teacher",
    "kd_mean_prob": "student distilled, mean of probabilities",
    "kd_mean_logit": "student distilled, mean of logits",
    "kd_confidence": "student distilled, weighted by confidence",
    "no_label_smoothing": "student from scratch, no label smoothing",
    "scratch_earlier_recipe": "student from scratch, earlier recipe",
    "earlier_recipe_longer": "student from scratch, earlier recipe twice",
    "kd_warm_start": "student distilled after the earlier recipe",
    "kd_shuffled": "student distilled, soft labels shuffled within classes",
    "kd_out_of_fold": "student distilled, soft labels of held-out images",
    "kd_self": "student distilled from one of its own kind",
    "kd_tuned": "student distilled, temperature and weight tuned for its teacher",
    "dkd": "student distilled, DKD", "dist": "student distilled, DIST",
    "kd_standardized": "student distilled, logits standardised",
    "kd_unlabelled": "student distilled, unlabelled images too",
    "scratch_all_labels": "student from scratch, all labels",
    "last_layer": "last layer fine-tuned", "last_block": "last block and last layer fine-tuned",
    "freeze_last_layer": "last layer fine-tuned, on two views",
    "freeze_last_block": "last block and last layer fine-tuned, on two views",
    "all": "whole network trained",
}  # fmt: skip
_SPECIAL = {character: f"\\{character}" for character in "{}$&%#_"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}",
}  # fmt: skip
_GREEK_AND_MATH = r"""
α \alpha β \beta γ \gamma δ \delta ε \epsilon ζ \zeta η \eta θ \theta ι \iota κ \kappa λ \lambda μ \mu ν \nu
ξ \xi π \pi ρ \rho σ \sigma τ \tau υ \upsilon φ \phi χ \chi ψ \psi ω \omega Γ \Gamma Δ \Delta Θ \Theta
Λ \Lambda Π \Pi Σ \Sigma Φ \Phi Ψ \Psi Ω \Omega − - → \rightarrow ← \leftarrow √ \surd ≈ \approx ≤ \leq ≥ \geq
≠ \neq ∞ \infty ∈ \in
""".split()
_MATH = dict(zip(_GREEK_AND_MATH[::2], _GREEK_AND_MATH[1::2], strict=True))


def _beyond_ascii(match: re.Match) -> str:
    character = match.group()
    if character in _MATH:
        return rf"\ensuremath{{{_MATH[character]}}}"
    if character in "–—…‘’“”•" or ("¡" <= character <= "ž" and character not in "ĦħĸĿŀŉŦŧ\u00ad"):
        return character  # the T1 and TS1 fonts have these
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    if plain.isalnum() or plain == " " or unicodedata.category(character)[0] in "MC":
        return plain
    return f"[U+{ord(character):04X}]"  # pdfLaTeX has no glyph; its number is better than a stopped build


def tex(text: Any) -> str:
    """Any text as LaTeX that prints that text; what pdfLaTeX has no glyph for appears as its code point."""
    text = unicodedata.normalize("NFC", " ".join(str(text).split()))
    text = "".join(_SPECIAL.get(character, character) for character in text).replace("--", "-{}-")
    text = re.sub(r"\b(\w) = (?=\d)", r"\1~=~", text)  # n = 5 stays on one line
    return re.sub(r"[^\x20-\x7e]", _beyond_ascii, text).replace(" ± ", "~±~").replace(r" \%", r"~\%")


# --- in a notebook ---


def _shown(kind: str, name: str, caption: str, note: str, bundle: dict[str, str]) -> None:
    caption = f"{caption} {note}".strip()
    display(bundle | {"text/plain": caption}, raw=True, metadata={
        "kdutils": {"kind": kind, "name": name, "caption": caption}})  # fmt: skip


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9-]+", name):
        raise UserError(f"name: {name!r} cannot name a figure or table; {RULE_OF_NAMES}")


def show_figure(fig: Figure, name: str, caption: str, note: str = "") -> None:
    """Show a figure with its caption, once, and close it; the exporter makes it the float `fig:<name>`.

    The output holds a PNG, the caption under it, and a vector PDF whose bytes depend on the figure alone.
    `note` is appended to the caption. Raises `UserError` for a name that is not of a-z, 0-9 and -.
    """
    _check_name(name)
    pdf, png = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        fig.savefig(pdf, format="pdf", bbox_inches="tight", pad_inches=0.02, metadata={"CreationDate": None})
    fig.set_layout_engine("none")  # all stays where it is in the PDF, legends too: they would go to the picture's edge
    for legend in fig.legends:
        place = legend.get_bbox_to_anchor().transformed(fig.transFigure.inverted())
        legend.set_bbox_to_anchor(place, fig.transFigure)
    lines = textwrap.fill(f"{caption} {note}".strip(), width=max(40, round(15 * fig.get_figwidth())))
    below = min(0, fig.get_tightbbox().y0) / fig.get_figheight()  # something may stick out of the figure
    fig.text(0.01, below - 0.02, lines, va="top", fontsize=9, color="0.25", parse_math=False)
    fig.savefig(png, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(fig)
    _shown("figure", name, caption, note, {
        "image/png": base64.b64encode(png.getvalue()).decode(),
        "application/pdf": base64.b64encode(pdf.getvalue()).decode(),
    })  # fmt: skip


def show_table(frame: pd.DataFrame, name: str, caption: str, note: str = "") -> None:
    """Show a table with its caption; the exporter makes it the float `tab:<name>` (see `show_figure`).

    Floats get three decimals, whole numbers groups of three digits, missing values a dash; an index other
    than 0, 1, 2, ... becomes the first column.
    """
    _check_name(name)
    texts = _as_text(frame)
    heading = f"<p>{html.escape(f'{caption} {note}'.strip())}</p>"  # a <caption> is no wider than its table
    _shown("table", name, caption, note, {"text/html": heading + _html(texts), "text/latex": _tabular(texts)})


def _as_text(frame: pd.DataFrame) -> pd.DataFrame:
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index(names=[name or "" for name in frame.index.names])
    names = [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in frame.columns]
    columns = [[_cell(value) for value in frame.iloc[:, i]] for i in range(frame.shape[1])]
    return pd.DataFrame(list(zip(*columns, strict=True)), columns=names, dtype=object)


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str) or isinstance(value, bool) or not hasattr(value, "__round__"):
        return " ".join(str(value).split())
    return f"{value:,}" if float(value).is_integer() and not isinstance(value, float) else f"{value:.3f}"


_NUMBER = re.compile(
    r"(?P<whole>(< )?[-+−]?[\d,]+|–|)(?P<fraction>\.\d+)?(?P<unit>e[-+]?\d+|\s*%)?"
    r"(?: ± (?P<sd_whole>[\d,]+)(?P<sd_fraction>\.\d+)?)?"
)
_INTERVAL = re.compile(r"([-+−][\d.]+ )?(\[[-+−][\d.]+, [-+−][\d.]+\]|\(one seed\))|–|")


def _is_right(column: pd.Series) -> bool:
    """Whether a column of texts goes to the right: numbers, or differences with their intervals."""
    return all(map(_NUMBER.fullmatch, column)) or all(map(_INTERVAL.fullmatch, column))


def _html(texts: pd.DataFrame) -> str:
    """The page of a table; JupyterLab puts every cell to the right that does not say where it goes."""
    sides = ["right" if _is_right(column) else "left" for _, column in texts.items()]
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
        numbers = [number for number in map(_NUMBER.fullmatch, column) if number]
        kinds.append("r" if _is_right(column) else "l")
        if kinds[-1] == "l" and max(map(len, column), default=0) > 60:
            kinds[-1] = r"p{0.42\linewidth}"
        is_number = len(numbers) == len(column)
        cells.append(_on_the_point(numbers) if is_number else [tex(text) for text in column])
    frame = pd.DataFrame(list(zip(*cells, strict=True)), columns=[tex(name) for name in texts.columns], dtype=object)
    return frame.to_latex(index=False, escape=False, column_format="".join(kinds))


def _on_the_point(numbers: list[re.Match]) -> list[str]:
    """Numbers as LaTeX, padded so that in a column to the right the decimal points of means and of deviations align."""
    parts = [{name: text or "" for name, text in number.groupdict().items()} for number in numbers]
    longest = {name: max((part[name] for part in parts), key=len) for name in (parts[0] if parts else ())}
    lines = []
    for part in parts:
        pad = {name: rf"\phantom{{{tex(longest[name][len(text):])}}}" if len(text) < len(longest[name]) else ""
               for name, text in part.items()}  # fmt: skip
        line = tex(part["whole"] + part["fraction"] + part["unit"]) + pad["fraction"] + pad["unit"]
        if part["sd_whole"]:
            line += f"~±~{pad['sd_whole']}{part['sd_whole']}{part['sd_fraction']}{pad['sd_fraction']}"
        elif longest["sd_whole"]:
            line += rf"\phantom{{~±~{longest['sd_whole']}{longest['sd_fraction']}}}"
        lines.append(line)
    return lines


# --- the exporter ---


def export_notebooks(notebooks: list[Path], out: Path) -> None:
    """Turn executed notebooks into what report.tex reads, with the nbconvert template in `report/template`.

    Writes `<stem>.tex` (one definition for each float), `<stem>-code.tex` (the code, for the appendix),
    `figures/<name>.pdf` and `notebooks.tex` (the stems, and the floats about how teachers were chosen, which some runs
    have) into `out`; removes what an earlier export
    left there. Raises `UserError` for a notebook that failed or did not finish, and for a name used twice.
    """
    import nbformat

    places: dict[str, str] = {}
    files: dict[Path, bytes] = {}
    for path in map(Path, notebooks):
        nb = nbformat.read(path, as_version=4)
        for number, cell in enumerate(nb.cells, start=1):
            if cell.cell_type != "code":
                continue
            _check_finished(cell, f"{shown_path(path)}, cell {number}")
            for shown in (output for output in cell.outputs if "kdutils" in output.get("metadata", {})):
                name, here = shown.metadata.kdutils.name, f"{path.name}, cell {number}"
                if name in places:
                    raise UserError(f"name: '{name}' is used in {places[name]} and in {here}; rename one")
                places[name] = here
                if shown.metadata.kdutils.kind == "figure":
                    files[out / "figures" / f"{name}.pdf"] = base64.b64decode(shown.data["application/pdf"])
        prose = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
        resources = {"kdutils": {"stem": path.stem, "title": (_headings(prose) or [path.stem])[0]}}
        files[out / f"{path.stem}.tex"] = _export(nb, "index.tex.j2", resources).encode()
        files[out / f"{path.stem}-code.tex"] = _export(nb, "code.tex.j2", resources).encode()
    stems = ",".join(Path(path).stem for path in notebooks)
    selection = ",".join(name for name in places if name.startswith(SELECTION))
    files[out / "notebooks.tex"] = f"\\def\\kdnotebooks{{{stems}}}\n\\def\\kdselection{{{selection}}}\n".encode()
    for path, content in files.items():
        write_atomically(path, partial(Path.write_bytes, data=content))
    for old in {*out.glob("*.tex"), *out.glob("figures/*.pdf")} - files.keys() - {out / "macros.tex"}:
        old.unlink()


def _check_finished(cell: nbformat.NotebookNode, place: str) -> None:
    for output in cell.outputs:
        if output.output_type == "error":
            error = " ".join(f"{output.ename}: {output.evalue}".split())
            raise UserError(f"notebook: {place} failed ({error}); mend it and run it again")
    done = cell.execution_count is not None or cell.metadata.get("papermill", {}).get("status") == "completed"
    if cell.source.strip() and not done:
        raise UserError(f"notebook: {place} has not been run; run the notebook to its end first")


def _export(nb: nbformat.NotebookNode, template: str, resources: dict[str, Any]) -> str:
    from nbconvert.exporters import LatexExporter
    from traitlets.config import Config

    off = {name: {"enabled": False} for name in ("ExtractOutputPreprocessor", "SVG2PDFPreprocessor")}
    ours = {"template_name": "template", "extra_template_basedirs": [str(REPORT)]}
    exporter = LatexExporter(config=Config(off), template_file=template, **ours)
    exporter.register_filter("tex", tex)
    exporter.register_filter("glyphs", lambda text: re.sub(r"[^\x00-\x7e]", _beyond_ascii, text))
    exporter.register_filter("headings", _headings)
    return exporter.from_notebook_node(nb, resources)[0]


def _headings(markdown: str) -> list[str]:
    prose = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^#{1,6}\s+(.+?)\s*#*\s*$", prose, flags=re.MULTILINE)
    return [re.sub(r"[*`$]", "", line) for line in lines]


# --- numbers and words ---


def write_macros(values: Mapping[str, str], out: Path) -> None:
    r"""Write `macros.tex` into `out`: every key becomes readable in report.tex as `\val{key}`."""
    for key in values:
        if not re.fullmatch(r"[A-Za-z0-9_./+-]+", key):
            raise UserError(f"macro: {key!r} cannot be a key; use letters, digits and _ . / + -")
    texts = {key: tex(value) for key, value in values.items()}
    if "command" in texts:  # a shell takes straight quotes alone
        texts["command"] = texts["command"].replace("'", r"\textquotesingle{}")
    lines = [rf"\expandafter\def\csname kd@val@{key}\endcsname{{{texts[key]}}}" for key in sorted(texts)]
    write_text(out / "macros.tex", "\n".join(lines) + "\n")


def result_values(results: pd.DataFrame, provenance: Mapping[str, Any]) -> dict[str, str]:
    """What report.tex's prose is made of: key -> text, from the rows of results.csv and the provenance.

    - `<arm>/<teachers>/<split>/<metric>/{mean,sd,pm,n,seeds}`, at the report's budget; `long/...` and `extra/...` at
      the others (see `at_budget`); the teachers of tasks 3 and 4 also as `teacher/<arch>/...`
    - `gap/<arch>`: test accuracy of a teacher minus that of the student from scratch, in points, of means
    - `best/{words,pm}`: the student of the highest mean validation accuracy at the report's budget, its test accuracy
    - `words/unlabelled`: how many images the arm with unlabelled images has beside the labelled ones
    - `settings/...` and all else in the provenance, by its path; `words/...`: counts with their nouns
    """
    settings = provenance.get("settings", {})
    values = _flat(provenance) | _setting_words(settings)
    for which in ("", LONG, "extra"):
        rows = at_budget(results, which, settings.get("epochs"))
        if which == LONG and len(rows):
            values["words/long_epochs"] = counted(int(rows.epochs.iloc[0]), "epoch")
        values |= _row_values(with_teachers(rows, settings), which)
    main = at_budget(results, "", settings.get("epochs"))
    accuracy = main[(main.metric == "accuracy") & ~main.task.isin(("2", "extra"))]
    on_val = accuracy[accuracy.split == "val"].groupby(["arm", "teachers"]).value.mean()
    accuracy = accuracy[accuracy.split == "test"]
    arms: dict[Any, pd.Series] = {keys: rows.value for keys, rows in accuracy.groupby(["arm", "teachers"])}
    if len(on_val):
        best = on_val.idxmax()
        values |= {"best/words": _arm_words(*best), "best/pm": _spread(arms[best], True)["pm"]}
    if len(all_labels := results[results.arm == "scratch_all_labels"]):
        values["words/unlabelled"] = f"{int(all_labels.labels.iloc[0]) - settings['train_size']:,}"
    teachers = with_teachers(main, settings)
    teachers = teachers[(teachers.arm == "teacher") & (teachers.split == "test") & (teachers.metric == "accuracy")]
    if ("scratch", "") in arms:
        gaps = 100 * (teachers.groupby("teachers").value.mean() - arms["scratch", ""].mean())
        values |= {f"gap/{arch}": signed(points) for arch, points in gaps.items()}
    return values


def with_teachers(rows: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    """The rows, and once more as of the arm `teacher` those of the ResNets that teach, not of their other variants."""
    tuned = rows[rows.task == "2"]
    only_one = tuned.groupby("teachers").arm.transform("nunique") == 1
    part = tuned.teachers.map({arch: trained_part(arch, settings) for arch in ARCHITECTURES})
    return pd.concat([rows, tuned[only_one | (tuned.arm == part)].assign(arm="teacher")])


def trained_part(arch: str, settings: Mapping[str, Any]) -> str:
    """Which part of a ResNet the settings want trained, as the arms of task 2 are named; empty if they do not say."""
    return "all" if settings.get("weights") == "none" else settings.get(f"{arch}_trainable", "")


def _row_values(rows: pd.DataFrame, which: str) -> dict[str, str]:
    values: dict[str, str] = {}
    keys: Any  # texts: pandas-stubs says Hashable
    for keys, group in rows.groupby(["arm", "teachers", "split", "metric"]):
        per_cent = "accuracy" in keys[-1] or keys[-1].startswith(("agreement", "ece"))
        path = "/".join([which, *keys] if which else keys)
        values |= {f"{path}/{name}": text for name, text in _spread(group.value, per_cent).items()}
    return values


def _normal(results: pd.DataFrame) -> pd.DataFrame:
    return results.assign(teachers=results.teachers.fillna(""), task=results.task.astype(str))


def _spread(column: pd.Series, per_cent: bool) -> dict[str, str]:
    scale, decimals = (100, 2) if per_cent else (1, 3)
    # scaled before the mean, as in the notebooks' tables: a number is not rounded here one way and there another
    (mean, sd), n = metrics.mean_sd([scale * value for value in column]), len(column)
    known = {"mean": f"{mean:.{decimals}f}", "n": str(n), "seeds": counted(n, "seed")}
    if math.isnan(sd):
        return known | {"sd": "unknown", "pm": known["mean"]}
    return known | {"sd": f"{sd:.{decimals}f}", "pm": f"{mean:.{decimals}f} ± {sd:.{decimals}f}"}


def signed(number: float, decimals: int = 2) -> str:
    """A difference as text, always with its sign."""
    return f"{round(number, decimals) + 0.0:+.{decimals}f}".replace("-", "−")


def _flat(tree: Any, path: str = "") -> dict[str, str]:
    if isinstance(tree, Mapping):
        names = {key: re.sub(r"[^A-Za-z0-9_.+-]", "-", str(key)) for key in tree}
        return {k: text for key in tree for k, text in _flat(tree[key], f"{path}/{names[key]}").items()}
    return {path.lstrip("/"): _value(tree, plain=path.endswith("seed"))}


def _value(value: Any, plain: bool = False) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item, plain=True) for item in value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return str(value) if plain else f"{value:,}"
    if isinstance(value, float):
        return re.sub(r"e([-+])0+", r"e\1", f"{value:g}")
    return WORDS.get(str(value), str(value))


def _setting_words(settings: Mapping[str, Any]) -> dict[str, str]:
    words = {}
    for name in ("epochs", "resnet50_epochs", "resnet18_epochs"):
        if name in settings:
            words[f"words/{name}"] = counted(settings[name], "epoch")
    for name in ("seeds", "teacher_seeds"):
        if name in settings:
            words[f"words/{name}"] = counted(len(settings[name]), "seed")
    if {"max_shift", "shift_step"} <= settings.keys():
        shifts = 2 * settings["max_shift"] // settings["shift_step"] + 1
        words["words/views"] = counted(2 * shifts**2, "view")
    for arch in ARCHITECTURES:
        if f"{arch}_trainable" in settings:
            words[f"{arch}/trainable-words"] = WORDS[trained_part(arch, settings)]
    return words


# --- the results table ---


def teacher_words(teachers: str) -> str:
    """The teachers of an arm, named in results.csv, in words."""
    return " + ".join(WORDS.get(name, name) for name in teachers.split("+"))


def _arm_words(arm: str, teachers: str = "") -> str:
    words = ARMS.get(arm, arm.replace("_", " "))
    return f"{words} ({teacher_words(teachers)})" if teachers else words


def results_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row an arm, in words: mean and standard deviation over its seeds of the test accuracy; NLL; ECE.

    What a later task repeats of an earlier one, as something to compare with, is shown once.
    """
    test = _normal(results[results.split == "test"]).sort_values("task", kind="stable")
    test = test.drop_duplicates(["arm", "teachers", "labels", "epochs", "seed", "metric"])
    counts = test.groupby(["arm", "teachers"])[["labels", "epochs"]].nunique()
    varying = [str(name) for name in counts if counts[name].max() > 1]
    rows = []
    keys: Any  # texts: pandas-stubs says Hashable
    for keys, group in test.groupby(["task", "arm", "teachers", *varying], sort=False):
        task, arm, teachers = keys[:3]
        by = {metric: column.value for metric, column in group.groupby("metric")}
        model = ARMS.get(arm, arm.replace("_", " "))
        if task == "2":
            model, teachers = f"{teacher_words(teachers)}, {model}", ""
        accuracy = _spread(by["accuracy"], per_cent=True)
        rows.append({
            "Task": task,
            "Model": model[:1].upper() + model[1:],
            "Teachers": teacher_words(teachers) or "–",
            **{name.capitalize(): _value(value) for name, value in zip(varying, keys[3:], strict=True)},
            "Test accuracy (%)": accuracy["pm"],
            "Seeds": accuracy["n"],
            **({"NLL": _spread(by["nll"], False)["mean"]} if "nll" in by else {}),
            **({"ECE (%)": f"{100 * by['ece'].mean():.1f}"} if "ece" in by else {}),
        })  # fmt: skip
    return pd.DataFrame(rows)


def markdown_table(frame: pd.DataFrame) -> str:
    """The frame as a table in GitHub's Markdown."""
    texts = _as_text(frame)
    rows = [list(texts.columns), ["---"] * texts.shape[1], *texts.values.tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def text_table(frame: pd.DataFrame) -> str:
    """The frame for a terminal: a line a row, words to the left, numbers to the right."""
    texts = _as_text(frame)
    lines = [list(texts.columns), *texts.values.tolist()]
    kinds = [">" if all(re.match(r"[-+−\d–]", cell) for cell in texts[name]) else "<" for name in texts]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    forms = [f"{kind}{width}" for kind, width in zip(kinds, widths, strict=True)]
    rows = ["  ".join(format(cell, form) for cell, form in zip(line, forms, strict=True)) for line in lines]
    return "\n".join(row.rstrip() for row in rows)


def update_readme(path: Path, tables: Mapping[str, pd.DataFrame], notes: str = "") -> None:
    """Put the tables, and `notes` under them, between `<!-- results:begin -->` and `<!-- results:end -->`.

    A table with a title is folded under it, that of the empty title stands open.
    """
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"README: {shown_path(path)} needs one line {begin} and, after it, one line {end}")
    shown = [
        f"<details><summary>{title}</summary>\n\n{markdown_table(frame)}\n\n</details>"
        if title
        else markdown_table(frame)
        for title, frame in tables.items()
    ]
    body = "\n\n".join(filter(None, [*shown, notes.strip()]))
    write_text(path, f"{text[: text.index(begin)]}{begin}\n{body}\n{text[text.index(end) :]}")


def update_pictures(readme: Path, notebooks: Sequence[Path]) -> None:
    """Renew the pictures `docs/pictures/<name>.png` that a README shows and a notebook has as its figure `<name>`."""
    import nbformat

    shown = set(re.findall(r"docs/pictures/([a-z0-9-]+)\.png", readme.read_text(encoding="utf-8")))
    for path in notebooks:
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", ()):
                name = output.get("metadata", {}).get("kdutils", {}).get("name")
                if name in shown and "image/png" in output.data:
                    picture = base64.b64decode(output.data["image/png"])
                    target = readme.parent / "docs" / "pictures" / f"{name}.png"
                    write_atomically(target, partial(Path.write_bytes, data=picture))


# --- the PDF ---


def build_pdf(report_dir: Path, generated: Path, pdf: Path) -> list[str]:
    """Typeset `report_dir`'s report.tex with what `generated` holds; the same input gives the same bytes.

    What LaTeX needs from run to run stays in a folder beside the PDF: with nothing changed, latexmk has nothing to do.
    Returns LaTeX's lines about boxes that stick out by more than 2 pt. Raises `UserError` when latexmk is
    missing, when LaTeX stops (with its first error and where the log is), and for undefined references.
    """
    if shutil.which("latexmk") is None or shutil.which("pdflatex") is None:
        raise LatexMissing(f"no PDF, because latexmk is missing; on Debian or Ubuntu type: {TEX_COMMAND}")
    for needed in ("macros.tex", "notebooks.tex"):
        if not (generated / needed).is_file():
            raise UserError(f"report: there is no {shown_path(generated / needed)}; run the notebooks first")
    build = pdf.with_suffix(".latex")  # ours alone: after an error it is removed, and when LaTeX was killed in it
    if not (build / "finished").is_file():
        shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True, exist_ok=True)
    (build / "finished").unlink(missing_ok=True)
    for name in ("report.tex", "references.bib"):
        shutil.copy(report_dir / name, build)
    shutil.rmtree(build / "generated", ignore_errors=True)
    shutil.copytree(generated, build / "generated")
    options = "-norc -pdf -halt-on-error -interaction=nonstopmode -latexoption=-no-shell-escape".split()
    fixed = {"FORCE_SOURCE_DATE": "1", "max_print_line": "1000"}
    environment = {"SOURCE_DATE_EPOCH": "0"} | dict(os.environ) | fixed
    run = subprocess.run(
        ["latexmk", *options, "report.tex"], cwd=build, env=environment,
        capture_output=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    log_file = build / "report.log"
    log = log_file.read_text("utf-8", "replace") if log_file.is_file() else run.stdout + run.stderr
    wrong = _what_is_wrong(log, run)
    kept = pdf.with_suffix(".log")
    if wrong:
        write_text(kept, log)
        shutil.rmtree(build)  # the next attempt starts afresh
        raise UserError(f"report: {wrong}; the log is {shown_path(kept)}")
    write_atomically(pdf, lambda part: shutil.copy(build / "report.pdf", part))
    (build / "finished").touch()
    kept.unlink(missing_ok=True)
    sticking_out = re.finditer(r"^Overfull .*?\(([\d.]+)pt too (?:wide|high)\).*$", log, flags=re.MULTILINE)
    return [found.group() for found in sticking_out if float(found[1]) > 2]


def _what_is_wrong(log: str, run: subprocess.CompletedProcess) -> str:
    if error := re.search(r"^! .*(?:\n(?!l\.\d).*){0,6}(?:\nl\.\d+.*)?", log, flags=re.MULTILINE):
        lines = [line.strip() for line in error.group().splitlines() if line.strip()]
        return "LaTeX stopped: " + " ".join(line for line in lines if line.startswith(("!", "l.")))
    undefined = re.findall(r"(?:Reference|Citation) [`'](.+?)'.* undefined", log)
    if undefined:
        return "undefined references: " + ", ".join(dict.fromkeys(undefined))
    return "latexmk failed: " + " ".join((run.stdout + run.stderr).split())[-300:] if run.returncode else ""
