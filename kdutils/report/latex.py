"""From executed notebooks to a PDF: floats and code for LaTeX, the prose's numbers, typesetting.

nbformat and nbconvert take seconds to import, so only the exporter imports them.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kdutils.cache import write_atomically, write_text
from kdutils.report.show import beyond_ascii, tex
from kdutils.results.tables import (
    LONG,
    NO_STUDENTS,
    TASK_ARMS,
    WORDS,
    arm_words,
    as_words,
    at_epochs,
    roles,
    signed,
    spread_of,
    teacher_words,
    trained_part,
    with_teachers,
)
from kdutils.settings import ROOT, UserError, counted, shown_path

if TYPE_CHECKING:
    import nbformat

REPORT = ROOT / "report"
TEX_COMMAND = "sudo apt-get install latexmk texlive-latex-extra lmodern"


class LatexMissing(UserError):
    """LaTeX is not installed."""


SELECTION = ("sweep-", "map-")  # begin the names of floats about how settings were chosen


# --- the exporter ---


def export_notebooks(notebooks: list[Path], out: Path) -> None:
    """Turn executed notebooks into what report.tex reads, by the nbconvert templates in `report/template`.

    Writes into `out`: `<stem>.tex` (one definition for each float), `<stem>-code.tex` (the code, for the appendix),
    `figures/<name>.pdf`, and `notebooks.tex` (the stems, and the floats about how settings were chosen). Removes the
    files of an earlier export. Raises `UserError` for a notebook that failed or did not finish, and for a name used
    twice.
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
            raise UserError(f"notebook: {place} failed ({error}); fix it and run it again")
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
    exporter.register_filter("glyphs", lambda text: re.sub(r"[^\x00-\x7e]", beyond_ascii, text))
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
            raise UserError(f"macro: {key!r} is not a valid key; use letters, digits and _ . / + -")
    texts = {key: tex(value) for key, value in values.items()}
    if "command" in texts:  # a shell needs straight quotes
        texts["command"] = texts["command"].replace("'", r"\textquotesingle{}")
    lines = [rf"\expandafter\def\csname kd@val@{key}\endcsname{{{texts[key]}}}" for key in sorted(texts)]
    write_text(out / "macros.tex", "\n".join(lines) + "\n")


def result_values(results: pd.DataFrame, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of report.tex's prose: key -> text, from the rows of results.csv and the provenance.

    The report names the two teachers by role: `first` and `second` as the settings list them, `both`, and `better`, on
    validation images.

    - `<arm>/<teachers>/<split>/<metric>/{mean,sd,pm,n,seeds}` of the students with the report's epochs; `long/...` of
      those with more (see `at_epochs`); the teachers of tasks 3 and 4 also as `teacher/<role>/...`
    - `gap/<role>`: mean test accuracy of a teacher minus that of the student from scratch, in points
    - `best/{words,pm}`: the student of the tasks with the highest mean validation accuracy, and its test accuracy
    - `<role>/...`: a teacher's settings and, in words, its `name`, `full-name`, `recipe`, `trained` part and
      `pretraining`
    - `settings/...` and all else in the provenance by its path; `words/...`: counts with their nouns
    """
    settings, two = provenance.get("settings", {}), roles(provenance)
    values = _flat(provenance) | _setting_words(settings)
    for role in ("first", "second", "better", "lesser")[: 4 * bool(two)]:
        values |= _teacher_words(role, two[role], provenance)
    for which in ("", LONG):
        rows = at_epochs(results, which, settings.get("epochs"))
        if which == LONG and len(rows):
            values["words/long_epochs"] = counted(int(rows.epochs.iloc[0]), "epoch")
        values |= _row_values(with_teachers(rows, settings), which, two)
    main = with_teachers(at_epochs(results, "", settings.get("epochs")), settings)
    accuracy = main[main.metric == "accuracy"].drop_duplicates(["arm", "teachers", "split", "seed"])
    of_test: dict[Any, pd.Series] = {
        keys: rows.value for keys, rows in accuracy[accuracy.split == "test"].groupby(["arm", "teachers"])
    }
    is_student = accuracy.arm.isin({*TASK_ARMS} - {*NO_STUDENTS, "scratch_all_labels"})
    on_val = accuracy[is_student & (accuracy.split == "val")].groupby(["arm", "teachers"]).value.mean()
    if len(on_val):
        best = on_val.idxmax()
        values |= {"best/words": arm_words(*best), "best/pm": spread_of(of_test[best], True)["pm"]}
    for role in ("first", "second")[: 2 * (("scratch", "") in of_test)]:
        if (one := ("teacher", two.get(role))) in of_test:
            values[f"gap/{role}"] = signed(100 * (of_test[one].mean() - of_test["scratch", ""].mean()))
    return values


def _row_values(rows: pd.DataFrame, which: str, two: Mapping[str, str]) -> dict[str, str]:
    values: dict[str, str] = {}
    keys: Any  # texts: pandas-stubs says Hashable
    for keys, group in rows.groupby(["arm", "teachers", "split", "metric"]):
        arm, teachers, split, metric = keys
        per_cent = metric.startswith(("accuracy", "agreement", "ece"))
        found = spread_of(group.value, per_cent)
        for role in [role for role, label in two.items() if label == teachers] or [_as_key(teachers)]:
            path = "/".join(([which] if which else []) + [arm, role, split, _by_role(metric, two)])
            values |= {f"{path}/{name}": text for name, text in found.items()}
    return values


def _by_role(name: str, two: Mapping[str, str]) -> str:
    """The name of a metric or of a loss's constants with a teacher's label in it, with `first` or `second` instead."""
    for role in ("first", "second"):
        name = re.sub(rf"(?<=[_/]){re.escape(two[role])}(?=$|_teacher_)", role, name) if two else name
    return _as_key(name)


def _as_key(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", str(name))


def _flat(tree: Any, path: str = "") -> dict[str, str]:
    """Every leaf of a tree as text, by its path. Records in a list go by their labels."""
    if isinstance(tree, (list, tuple)) and any(isinstance(item, Mapping) for item in tree):
        tree = {item["label"]: item for item in tree}
    if isinstance(tree, Mapping):
        return {k: text for key in tree for k, text in _flat(tree[key], f"{path}/{_as_key(key)}").items()}
    return {path.lstrip("/"): as_words(tree, plain=path.endswith("seed"))}


def _setting_words(settings: Mapping[str, Any]) -> dict[str, str]:
    words = {}
    for name, noun in (("epochs", "epoch"), ("unlabelled_epochs", "epoch"), ("unlabelled_views", "view")):
        if name in settings:
            words[f"words/{name}"] = counted(settings[name], noun)
    for name in ("seeds", "teacher_seeds"):
        if name in settings:
            words[f"words/{name}"] = counted(len(settings[name]), "seed")
    if {"max_shift", "shift_step"} <= settings.keys():
        shifts = 2 * settings["max_shift"] // settings["shift_step"] + 1
        words["words/views"] = counted(2 * shifts**2, "view")
    return words


def _teacher_words(role: str, label: str, provenance: Mapping[str, Any]) -> dict[str, str]:
    settings = provenance["settings"]
    (teacher,) = [teacher for teacher in settings["teachers"] if teacher["label"] == label]
    facts = provenance.get("weights", {}).get(label, {})
    views = counted(facts.get("views_trained", teacher["views"]), "view")
    recipe = (
        f"{counted(teacher['epochs'], 'epoch')} of {as_words(teacher['optimizer'])} on {views}, batches of "
        f"{teacher['batch_size']}, a {as_words(teacher['schedule'])} schedule with peak learning rate "
        f"{as_words(teacher['learning_rate'])}, weight decay {as_words(teacher['weight_decay'])}, label smoothing "
        f"{as_words(teacher['label_smoothing'])}"
    )
    if teacher.get("folds", 1) > 1:
        recipe += f", cross-fitted in {teacher['folds']} folds"
    name, network = teacher_words(label), as_words(teacher["name"])
    words = {"name": name, "full-name": name if name == network else f"{name} ({network})", "recipe": recipe}
    words["trained"] = WORDS[trained_part(label, settings)]
    if "description" in facts:
        words["pretraining"] = facts["description"]
    return _flat(teacher, role) | {f"{role}/{name}": text for name, text in words.items()}


# --- the PDF ---


def build_pdf(report_dir: Path, generated: Path, pdf: Path) -> list[str]:
    """Typeset `report_dir`'s report.tex with the files of `generated`; the same input gives the same bytes.

    LaTeX's own files stay in a folder beside the PDF, so that latexmk does nothing where nothing changed. Returns
    LaTeX's lines about boxes that stick out by more than 2 pt. Raises `UserError` when latexmk is missing, when LaTeX
    stops (with its first error and the log's path), and for undefined references.
    """
    if shutil.which("latexmk") is None or shutil.which("pdflatex") is None:
        raise LatexMissing(f"no PDF, because latexmk is missing; on Debian or Ubuntu type: {TEX_COMMAND}")
    for needed in ("macros.tex", "notebooks.tex"):
        if not (generated / needed).is_file():
            raise UserError(f"report: there is no {shown_path(generated / needed)}; run the notebooks first")
    build = pdf.with_suffix(".latex")  # removed after an error, and when LaTeX was killed in it
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
    command = ["latexmk", *options, "report.tex"]
    run = subprocess.run(command, cwd=build, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    log_file = build / "report.log"
    log = log_file.read_text("utf-8", "replace") if log_file.is_file() else run.stdout + run.stderr
    wrong = _what_is_wrong(log, run)
    kept = pdf.with_suffix(".log")
    if wrong:
        write_text(kept, log)
        shutil.rmtree(build)
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
