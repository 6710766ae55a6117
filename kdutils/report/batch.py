"""The notebooks in batch, through papermill; the report made of them; `python -m kdutils` calls these."""

import contextlib
import json
import logging
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kdutils.cache import write_text
from kdutils.data.images import load_data
from kdutils.lab.study import earlier_words, tuned_words
from kdutils.models import SmallCNN
from kdutils.progress import Batch
from kdutils.report.claims import claim_values, compare
from kdutils.report.latex import REPORT, build_pdf, export_notebooks, result_values, write_macros
from kdutils.report.readme import update_pictures, update_readme
from kdutils.results.metrics import parameter_count
from kdutils.results.tables import (
    FREEZE,
    TRAINED_PARTS,
    WORDS,
    _read_provenance,
    at_budget,
    minutes,
    of_the_tasks,
    read_results,
    results_checksum,
    results_table,
    signed,
    text_table,
    times_table,
)
from kdutils.settings import (
    ARCHITECTURES,
    ROOT,
    Settings,
    UserError,
    apply_threads,
    load_settings,
    logits_file,
    shown_path,
)
from kdutils.teachers import check_space, check_weights, save_logits

EXECUTED_WITH = "executed-with.txt"  # beside the executed notebooks: the digest of their settings
NOTEBOOKS = ("01_small_cnn", "02_fine_tuned_resnets", "03_one_teacher", "04_two_teachers")


def notebooks_of(settings: Settings) -> tuple[str, ...]:
    """The notebooks that a run with these settings executes: the four, and the study's if it has any arms."""
    return NOTEBOOKS + (("study",) if settings.study else ())


def notebook_path(name: str) -> Path:
    """Where a notebook lies: the study's in a folder of its own."""
    return ROOT / "notebooks" / ("beyond" if name == "study" else "") / f"{name}.ipynb"


def run(profile: str, parameters: Mapping[str, Any]) -> Settings:
    """Run the four notebooks into `runs/<profile>/notebooks/`; stops at the first that fails.

    Everything the notebooks will need is checked before the first of them starts. Raises `UserError` with the
    failing cell's error and the partial notebook's path.
    """
    settings = load_settings(profile, **parameters)
    apply_threads(settings)
    dataset = load_data(settings)
    for arch in ARCHITECTURES:
        check_weights(arch, dataset, settings)
    if settings.weights != "generated":  # those are not there yet; their features are small
        check_space(dataset, settings)
    print(
        f"{dataset.name}; {settings.device}, {settings.precision}; cached results in {shown_path(settings.run_folder)}"
    )
    folder = settings.run_folder / "notebooks"
    write_text(folder / EXECUTED_WITH, settings.digest())
    given = {"profile": profile} | {name: getattr(settings, name) for name in parameters}
    start = time.monotonic()
    batch = _live_batch(settings)
    for name in notebooks_of(settings):
        begun = time.monotonic()
        if batch:
            batch.begin(name)
        _execute(name, folder / f"{name}.ipynb", given, settings, batch)
        print(f"{name}: done in {minutes(time.monotonic() - begun)}", flush=True)
    print(f"all notebooks: {minutes(time.monotonic() - start)}; results in "
          f"{shown_path(settings.run_folder / 'results.csv')}")  # fmt: skip
    print(f"\n{text_table(times_table(settings.run_folder))}\n")
    return settings


def _live_batch(settings: Settings) -> Batch | None:
    """For a terminal; elsewhere lines are printed as they come."""
    if not sys.stdout.isatty():
        return None
    return Batch(notebooks_of(settings), settings, shutil.get_terminal_size().columns)


def _execute(
    name: str, output: Path, parameters: Mapping[str, Any], settings: Settings, batch: Batch | None = None
) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    # it warns of every parameter that a notebook does not list; the notebooks refuse those that are no settings
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        with _progress_log(settings.run_folder / "progress.log", batch):
            papermill.execute_notebook(
                str(notebook_path(name)), str(output), dict(parameters),
                kernel_name="python3", cwd=str(ROOT / "notebooks"), progress_bar=False,
                extra_arguments=["--IPKernelApp.log_level=ERROR"],
            )  # fmt: skip
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
    """Show in this terminal the progress lines that trainings in a notebook's kernel append to a file."""
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
    """Export the executed notebooks into `out/generated`, beside their rows and provenance; returns that folder.

    Into the project's own report folder, the executed notebooks are copied too, and README.md's table and pictures are
    made anew.
    """
    results, provenance = read_results(settings.run_folder), _read_provenance(settings.run_folder)
    if provenance["settings"] != json.loads(json.dumps(settings.identity())):
        raise UserError(
            f"report: {shown_path(settings.run_folder)} was last run with other settings; "
            f"run it again with these, or report with: {provenance['command'].replace(' run ', ' report ', 1)}"
        )
    text = (settings.run_folder / "results.csv").read_text(encoding="utf-8")
    if provenance.get("results") != results_checksum(text):
        raise UserError(
            f"report: {shown_path(settings.run_folder / 'results.csv')} is not as the last run wrote it (its checksum "
            f"does not fit); run the notebooks again: {provenance['command']}"
        )
    folder = settings.run_folder / "notebooks"
    digest = (folder / EXECUTED_WITH).read_text(encoding="utf-8") if (folder / EXECUTED_WITH).is_file() else None
    tasks = set(results.task)
    if digest != settings.digest() or not tasks >= {"1", "2", "3", "4"}:
        raise UserError(
            f"report: {shown_path(folder)} does not hold all four notebooks as run with these settings; "
            f"run them again: {provenance['command']}"
        )
    generated = out / "generated"
    notebooks = [settings.run_folder / "notebooks" / f"{name}.ipynb" for name in notebooks_of(settings)]
    missing = [shown_path(path) for path in notebooks if not path.is_file()]
    if missing:
        raise UserError(
            f"report: {', '.join(missing)} not there; run the notebooks first (python -m kdutils run, "
            "with the same profile)"
        )
    export_notebooks(notebooks, generated)
    for name in ("results.csv", "provenance.json", "timings.csv"):
        shutil.copyfile(settings.run_folder / name, generated / name)
    if out == REPORT:
        for path in notebooks:
            _copy_notebook(path, out / "notebooks" / path.name)
        if not any(logits_file(settings.weights, arch) for arch in ARCHITECTURES):
            dataset = load_data(settings)
            for arch in ARCHITECTURES:
                save_logits(arch, dataset, settings, out / "teachers")
        tables = {"": of_the_tasks(results, settings.epochs), "All arms, the study's among them": results}
        update_readme(
            ROOT / "README.md", {title: results_table(rows) for title, rows in tables.items()},
            readme_note(provenance),
        )  # fmt: skip
        update_pictures(ROOT / "README.md", notebooks)
    return generated


def macros(results: pd.DataFrame, provenance: Mapping[str, Any]) -> dict[str, str]:
    """All that tex reads by name: numbers, settings, claims, and words about data and weights."""
    return result_values(results, provenance) | claim_values(results, provenance) | report_words(provenance)


def typeset(generated: Path, pdf: Path) -> Path:
    """Typeset what lies in `generated` into `pdf`, with all that tex reads by name made of the rows anew."""
    if not (generated / "notebooks.tex").is_file():
        raise UserError(f"report: {shown_path(generated)} holds nothing to typeset; run `make report` first")
    write_macros(macros(read_results(generated), _read_provenance(generated)), generated)
    for box in build_pdf(REPORT, generated, pdf):
        print(f"report: {box}")
    return pdf


def report_words(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The report's texts that neither a result nor a setting gives: the notices on its first page, among others."""
    data, weights = provenance["data"], provenance["weights"]
    about_data = ""
    if data["is_generated"]:
        about_data = (
            f"Generated data, demonstration: the images are {data['name']}. "
            "These numbers say nothing about photographs."
        )
    elif not data["is_cifar10"]:
        about_data = f"The images are not those of CIFAR-10 itself: {data['name']}."
    standins = [f"{WORDS[arch]}: {facts['description']}" for arch, facts in weights.items() if facts["is_standin"]]
    about_weights = "Stand-in weights in place of ImageNet's: pre-trained on other, fewer images." if standins else ""
    words = {"notice/data": about_data, "notice/weights": about_weights, "words/standins": "; ".join(standins)}
    words |= {"words/tuned": tuned_words(), "words/earlier": earlier_words()}
    if any("crops" in facts["description"] for facts in weights.values()):
        words["words/crops"] = (
            "Crops are random parts of the images, reduced to the size that is named, as the images of the ten classes "
            "are, and enlarged again."
        )
    words |= _limits(data, any(facts["is_standin"] for facts in weights.values()))
    words["student/parameters"] = f"{parameter_count(SmallCNN()):,}"
    views = {facts["views_trained"] for facts in weights.values()}
    words["words/teacher_views"] = " or ".join(f"{count} view{'s' * (count > 1)}" for count in sorted(views))
    return words | {f"{arch}/weights-words": facts["description"] for arch, facts in weights.items()}


def _limits(data: Mapping[str, Any], has_standins: bool) -> dict[str, str]:
    """What the report's limitations say of data and weights that are not those of the assignment; else empty."""
    about_data = f"{data['name']} is not CIFAR-10 itself, and numbers reported for that are not comparable."
    if "jpeg" in data["name"].lower():
        about_data += " JPEG loses fine detail, of which such small images have little to spare."
    about_weights = (
        "The teachers were pre-trained on other images than ImageNet's and may know less than the ResNets whose names "
        "they bear. What distillation gives with ImageNet's weights, these numbers do not tell."
    )
    is_original = data["is_cifar10"] and not data["is_generated"]
    return {"limits/data": "" if is_original else about_data, "limits/weights": about_weights if has_standins else ""}


def readme_note(provenance: Mapping[str, Any]) -> str:
    """The lines under the README's table: what the numbers were measured on, and the command that makes them again."""
    data, words = provenance["data"], report_words(provenance)
    sizes = f"{data['name']}: {data['train']:,} training, {data['val']:,} validation, {data['test']:,} test images"
    measured = f"Mean ± standard deviation over seeds, last epoch. {sizes}."
    standins = f"{words['words/standins']}." if words["words/standins"] else ""
    lines = [measured, words["notice/data"], words["notice/weights"], standins]
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


def run_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """What a run (or the report) found, by title; `folder` holds its rows, provenance and times."""
    results, provenance = read_results(folder), _read_provenance(folder)
    values = result_values(results, provenance)
    accuracy = at_budget(results, "", provenance.get("settings", {}).get("epochs"))
    accuracy = accuracy[(accuracy.split == "test") & (accuracy.metric == "accuracy")]
    by_seed = {arm: dict(zip(rows.seed, 100 * rows.value)) for arm, rows in accuracy.groupby(["arm", "teachers"])}
    arms = results.sort_values("task", kind="stable")[["arm", "teachers"]].drop_duplicates()
    parts = {"Train (%)": "train/accuracy", "Validation (%)": "val/accuracy", "Test (%)": "test/accuracy",
             "Test macro F1": "test/macro_f1", "Test entropy": "test/entropy"}  # fmt: skip
    by_part, differences = [], []
    for arm, teachers in arms.itertuples(index=False):
        named = {"Arm": arm, "Teachers": teachers or "–"}
        spreads = {title: values.get(f"{arm}/{teachers}/{key}/pm", "–") for title, key in parts.items()}
        by_part.append(named | spreads)
        pair = by_seed.get((arm, teachers), {}), by_seed.get(("scratch", ""), {})
        if pair[0].keys() & pair[1].keys() and arm.removeprefix(FREEZE) not in TRAINED_PARTS and pair[0] is not pair[1]:
            mean, low, high, n = compare(*pair)
            interval = f"{signed(low)} to {signed(high)}" if n > 1 else "one seed"
            differences.append(named | {"Points": signed(mean), "95 % interval": interval})
    tables = {
        "Test images": results_table(results),
        "Each part of the data": pd.DataFrame(by_part),
        "Test accuracy against the student from scratch, paired by seed": pd.DataFrame(differences),
        "Wall time": times_table(folder),
    }
    return {title: table for title, table in tables.items() if len(table)}


def shown_tables(folder: Path) -> str:
    """`run_tables` as text, under what they were measured on."""
    tables = [f"{title}\n\n{text_table(table)}" for title, table in run_tables(folder).items()]
    measured, made_by = readme_note({"weights": {}} | _read_provenance(folder)).replace("`", "").split("\n\n")
    return "\n\n".join([textwrap.fill(measured, 110), made_by, *tables])
