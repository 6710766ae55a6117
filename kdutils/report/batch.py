"""Run the notebooks in batch, through papermill, and make the report of them."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kdutils.cache import write_text
from kdutils.data.images import load_data
from kdutils.models import SmallCNN
from kdutils.progress import Batch
from kdutils.report.claims import claim_values
from kdutils.report.latex import REPORT, build_pdf, export_notebooks, result_values, write_macros
from kdutils.report.readme import update_pictures, update_readme
from kdutils.results.metrics import parameter_count
from kdutils.results.record import read_provenance, read_results, results_checksum
from kdutils.results.tables import (
    minutes,
    of_the_tasks,
    results_table,
    run_tables,
    teacher_words,
    text_table,
    times_table,
    warnings,
)
from kdutils.settings import ROOT, Settings, UserError, apply_threads, load_settings, shown_path
from kdutils.teachers import check_space, check_weights
from kdutils.weights import weights_source

EXECUTED_WITH = "executed-with.txt"  # beside the executed notebooks: the digest of their settings
NOTEBOOKS = ("01_small_cnn", "02_two_big_cnns", "03_one_teacher", "04_two_teachers")


def notebooks_of(settings: Settings) -> tuple[str, ...]:
    """The notebooks that a run with these settings executes: the four, and the study's if any group is named."""
    return NOTEBOOKS + (("study",) if settings.study else ())


def notebook_path(name: str) -> Path:
    """Where a notebook lies: the study's in a folder of its own."""
    return ROOT / "notebooks" / ("beyond" if name == "study" else "") / f"{name}.ipynb"


def run(profile: str, parameters: Mapping[str, Any]) -> Settings:
    """Run the notebooks into `runs/<profile>/notebooks/`; stop at the first that fails.

    Data, weights and disk space are checked before the first one starts. Raises `UserError` with the failing cell's
    error and the path of the partial notebook.
    """
    settings = load_settings(profile, **parameters)
    apply_threads(settings)
    teachers = (*settings.teachers, *(settings.backbones if "backbones" in settings.study else ()))
    for teacher in teachers:
        weights_source(teacher.name, teacher.weights)  # a look at what is there, before images are read
    dataset = load_data(settings)
    for teacher in teachers:
        check_weights(teacher, dataset, settings)
    check_space(dataset, settings, teachers)
    print(
        f"{dataset.name}; {settings.device}, {settings.precision}; cached results in {shown_path(settings.run_folder)}"
    )
    folder = settings.run_folder / "notebooks"
    write_text(folder / EXECUTED_WITH, settings.digest())
    values = dataclasses.asdict(settings)  # plain ones, teachers too
    given = {"profile": profile} | {name: values[name] for name in parameters}
    start = time.monotonic()
    batch = _live_batch(settings)
    for name in notebooks_of(settings):
        begun = time.monotonic()
        if batch:
            batch.begin(name)
        _execute(name, folder / f"{name}.ipynb", given, settings, batch)
        print(f"{name}: done in {minutes(time.monotonic() - begun)}", flush=True)
    results = shown_path(settings.run_folder / "results.csv")
    print(f"all notebooks: {minutes(time.monotonic() - start)}; results in {results}")
    print(f"\n{text_table(times_table(settings.run_folder))}\n")
    return settings


def _live_batch(settings: Settings) -> Batch | None:
    """In a terminal the progress lines overwrite each other; elsewhere (None) they are printed as they come."""
    if not sys.stdout.isatty():
        return None
    return Batch(notebooks_of(settings), settings, shutil.get_terminal_size().columns)


def _execute(
    name: str, output: Path, parameters: Mapping[str, Any], settings: Settings, batch: Batch | None = None
) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    # papermill warns of each parameter that a notebook does not list; the notebooks check them themselves
    logging.getLogger("papermill").setLevel(logging.ERROR)
    quiet = {"progress_bar": False, "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
    where = {"kernel_name": "python3", "cwd": str(ROOT / "notebooks")}
    try:
        with _progress_log(settings.run_folder / "progress.log", batch):
            papermill.execute_notebook(notebook_path(name), output, dict(parameters), **where, **quiet)
    except PapermillExecutionError as error:
        reason = error.evalue if error.ename in ("UserError", "TrainingError") else f"{error.ename}: {error.evalue}"
        raise UserError(
            f"{name} stopped in cell {error.exec_count}: {reason} (what had run: {shown_path(output)})"
        ) from error
    except (RuntimeError, KeyError) as error:  # nbclient's DeadKernelError and jupyter_client's NoSuchKernel
        raise UserError(
            f"{name} lost its Python kernel ({error}); if memory ran out, lower teacher_size, teacher_views or "
            f"feature_memory_gb (what had run: {shown_path(output)})"
        ) from error


@contextlib.contextmanager
def _progress_log(path: Path, batch: Batch | None = None) -> Iterator[None]:
    """Show here the progress lines that trainings in a notebook's kernel append to a file."""
    write_text(path, "")
    os.environ["KDUTILS_PROGRESS"] = str(path)
    stop = threading.Event()

    def follow() -> None:
        with path.open(encoding="utf-8") as log:
            while True:
                last = stop.is_set()
                for line in log:
                    line = line.rstrip("\n")
                    print(batch.text(line) if batch else f"  {line}\n", end="", flush=True)
                if last:
                    print(batch.end() if batch else "", end="", flush=True)
                    return
                stop.wait(0.5)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()
        del os.environ["KDUTILS_PROGRESS"]


def export(settings: Settings, out: Path) -> Path:
    """Export the executed notebooks into `out/generated`, with their rows and provenance; returns that folder.

    Into the project's own report folder, this copies the executed notebooks too, and renews README.md's results.
    Raises `UserError` where rows, provenance and notebooks are not of one run with these settings.
    """
    folder = settings.run_folder
    notebooks = [folder / "notebooks" / f"{name}.ipynb" for name in notebooks_of(settings)]
    results, provenance = read_results(folder), read_provenance(folder)
    _check_same_run(settings, results, provenance, notebooks)
    generated = out / "generated"
    export_notebooks(notebooks, generated)
    for name in ("results.csv", "provenance.json", "timings.csv"):
        shutil.copyfile(folder / name, generated / name)
    if out == REPORT:
        for path in notebooks:
            _copy_notebook(path, out / "notebooks" / path.name)
        renew_readme(ROOT / "README.md", generated, notebooks)
    return generated


def _check_same_run(
    settings: Settings, results: pd.DataFrame, provenance: Mapping[str, Any], notebooks: Sequence[Path]
) -> None:
    folder, again = settings.run_folder, f"run the notebooks again: {provenance['command']}"
    if provenance["settings"] != json.loads(json.dumps(settings.identity())):
        raise UserError(
            f"report: {shown_path(folder)} was last run with other settings; run it again with these, or report with: "
            f"{provenance['command'].replace(' run ', ' report ', 1)}"
        )
    if provenance.get("results") != results_checksum((folder / "results.csv").read_text(encoding="utf-8")):
        raise UserError(
            f"report: {shown_path(folder / 'results.csv')} changed after the last run (its checksum differs); {again}"
        )
    executed_with = folder / "notebooks" / EXECUTED_WITH
    digest = executed_with.read_text(encoding="utf-8") if executed_with.is_file() else None
    if digest != settings.digest() or not set(results.task) >= {"1", "2", "3", "4"}:
        raise UserError(
            f"report: {shown_path(executed_with.parent)} lacks some of the four notebooks as run with these settings; "
            f"{again}"
        )
    missing = [shown_path(path) for path in notebooks if not path.is_file()]
    if missing:
        raise UserError(f"report: {', '.join(missing)} missing; {again}")


def renew_readme(readme: Path, generated: Path, notebooks: Sequence[Path]) -> None:
    """Rewrite README.md's table of results, the note under it and its pictures: from `generated` and the notebooks."""
    results, provenance = read_results(generated), read_provenance(generated)
    of_tasks = of_the_tasks(results, provenance["settings"]["epochs"])
    tables = {"": results_table(of_tasks), "All arms, the study's among them": results_table(results)}
    update_readme(readme, tables, readme_note(provenance))
    update_pictures(readme, notebooks)


def macros(results: pd.DataFrame, provenance: Mapping[str, Any]) -> dict[str, str]:
    """All that report.tex reads by name: numbers, settings, claims, and words about data and weights."""
    values = result_values(results, provenance) | claim_values(results, provenance) | report_words(provenance)
    return values | {"notice/teachers": " ".join(warnings(results, provenance))}


def typeset(generated: Path, pdf: Path) -> Path:
    """Typeset `generated` into `pdf`; the macros that report.tex reads are written from the rows first."""
    if not (generated / "notebooks.tex").is_file():
        raise UserError(f"report: {shown_path(generated)} holds nothing to typeset; run `make report` first")
    write_macros(macros(read_results(generated), read_provenance(generated)), generated)
    for box in build_pdf(REPORT, generated, pdf):
        print(f"report: {box}")
    return pdf


def report_words(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The report's texts that come from neither a result nor a setting: the notices on its first page, what its
    limitations say of data and weights, the student's number of parameters."""
    data, name = provenance["data"], provenance["data"]["name"]
    about_data = limit = about_weights = ""
    if data["is_generated"]:
        about_data = f"Generated data, demonstration: {name}. These numbers say nothing about photographs."
    elif not data["is_cifar10"]:
        about_data = f"The images are not those of CIFAR-10 itself: {name}."
    if about_data:
        limit = f"{name} is not CIFAR-10 itself, so the numbers do not compare with those reported for it."
    standins = {label: facts for label, facts in provenance["weights"].items() if facts["is_standin"]}
    if standins:
        described = [f"{teacher_words(label)}: {facts['description']}" for label, facts in standins.items()]
        about_weights = f"Teachers without ImageNet's weights. {'; '.join(described)}."
    return {
        "notice/data": about_data, "notice/weights": about_weights, "limits/data": limit,
        "student/parameters": f"{parameter_count(SmallCNN()):,}",
        "words/unlabelled": f"{data['unlabelled']:,}" if data.get("unlabelled") else "no",
    }  # fmt: skip


def readme_note(provenance: Mapping[str, Any]) -> str:
    """The lines under README's table: what the numbers were measured on, and the command that repeats the runs."""
    data, words = provenance["data"], report_words(provenance)
    sizes = f"{data['name']}: {data['train']:,} training, {data['val']:,} validation, {data['test']:,} test images"
    if data.get("unlabelled"):
        sizes = f"{sizes}, and {data['unlabelled']:,} without labels"
    lines = [
        f"Mean ± standard deviation over seeds, last epoch. {sizes}.",
        words["notice/data"],
        words["notice/weights"],
    ]
    return " ".join(line for line in lines if line) + f"\n\nMade by `{provenance['command']}`."


def _copy_notebook(source: Path, target: Path) -> None:
    """Copy an executed notebook without the paths and times of the machine that ran it."""
    import nbformat

    notebook = nbformat.read(source, as_version=4)
    for part in (notebook, *notebook.cells):
        part.metadata.pop("papermill", None)
        part.metadata.pop("execution", None)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def shown_tables(folder: Path) -> str:
    """`run_tables` as text, under what they were measured on."""
    tables = [f"{title}\n\n{text_table(table)}" for title, table in run_tables(folder).items()]
    measured, made_by = readme_note({"weights": {}} | read_provenance(folder)).replace("`", "").split("\n\n")
    return "\n\n".join([textwrap.fill(measured, 110), made_by, *tables])
