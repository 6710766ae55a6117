"""What a run writes down: `results.csv` (a row per number), `provenance.json` (what the numbers depend on) and
`timings.csv`.

Every notebook records its own rows under `found/`; the three files are rewritten from all of them.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from kdutils.cache import lock, remove_cut_off, write_text
from kdutils.data.images import Dataset
from kdutils.models import normalise
from kdutils.results import metrics
from kdutils.settings import (
    ROOT,
    Settings,
    TeacherSettings,
    UserError,
    checked,
    counted,
    default_of,
    load_settings,
    read_profile,
    shown_path,
)
from kdutils.students import StudentRun
from kdutils.teachers import Teacher, TeacherRun, better_teacher
from kdutils.training import predict

PARTS = ("train", "val", "test")
# other people's results have these columns: they stay
RESULT_COLUMNS = ("task", "arm", "teachers", "labels", "epochs", "seed", "split", "metric", "value")
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pandas", "papermill", "nbconvert")
Scores = dict[tuple[str, str], float]  # by (part of the data, metric)
Run = StudentRun | TeacherRun


# --- measures of trained networks ---


def column(runs: Sequence[Run], dataset: Dataset, part: str, metric: str) -> list[float]:
    """One measure of every run, in the order of the seeds. part: train, val or test; metric: accuracy (a fraction),
    nll, ece, entropy or macro_f1."""
    measure = {
        "accuracy": metrics.accuracy,
        "nll": metrics.nll,
        "ece": metrics.ece,
        "entropy": lambda logits, labels: metrics.predictive_entropy(logits),
        "macro_f1": lambda logits, labels: metrics.macro_scores(logits, labels)["f1"],
    }[metric]
    return [measure(run.logits[part], getattr(dataset, part).labels) for run in runs]


def right(runs: Sequence[Run], dataset: Dataset) -> Tensor:
    """Which test images each run classifies correctly: bool [runs, N]."""
    return torch.stack([metrics.correct(run.logits["test"], dataset.test.labels) for run in runs])


def flip_column(runs: Sequence[StudentRun], dataset: Dataset, settings: Settings) -> list[float]:
    """Test accuracy of every run with probabilities averaged over each image and its mirror image."""
    mirrored = normalise(dataset.test.images.flip(3))
    networks = [run.network().to(mirrored.device) for run in runs]
    of_mirrored = [predict(network, mirrored, settings.precision) for network in networks]
    return [
        metrics.accuracy(metrics.mean_probabilities([run.logits["test"], other]), dataset.test.labels)
        for run, other in zip(runs, of_mirrored, strict=True)
    ]


def scores(run: Run, dataset: Dataset) -> Scores:
    """Every measure of one trained network: accuracy, nll, ece and entropy of each part, macro scores of test."""
    found: Scores = {}
    for part in PARTS:
        logits, labels = run.logits[part], getattr(dataset, part).labels
        found |= {(part, metric): value for metric, value in metrics.evaluate(logits, labels).items()}
        found[part, "entropy"] = metrics.predictive_entropy(logits)
    macro = metrics.macro_scores(run.logits["test"], dataset.test.labels)
    return found | {("test", f"macro_{metric}"): value for metric, value in macro.items()}


def follows(run: StudentRun, teacher: Teacher, dataset: Dataset) -> dict[str, float]:
    """How a student follows a teacher on the test images: `agreement_<label>`; the same `_teacher_right` and
    `_teacher_wrong`, on the images that the teacher classifies correctly and on its errors; and the divergence
    `kl_<label>`, in nats."""
    pair, name = (run.logits["test"], teacher.run_for(run.seed).logits["test"]), f"agreement_{teacher.label}"
    found = {name: metrics.agreement(*pair), f"kl_{teacher.label}": metrics.fidelity(*pair)}
    by_teacher = metrics.agreement_by_teacher(*pair, dataset.test.labels)
    return found | {f"{name}_{part}": share for part, share in by_teacher.items()}


# --- rows ---


def student_rows(
    task: int | str,
    runs: Sequence[StudentRun],
    dataset: Dataset,
    settings: Settings,
    teachers: Sequence[Teacher] = (),
    labels: int | None = None,
) -> list[dict]:
    """Rows of results.csv of one method, all seeds: its `scores`, on test images also `accuracy_flip` (see
    `flip_column`) and how it `follows` each of the teachers.

    settings: those it was trained with; labels: how many it was given, if not those of the training part.
    """
    named = {"task": str(task), "labels": labels or settings.train_size, "epochs": settings.epochs}
    rows = []
    for run, flipped in zip(runs, flip_column(runs, dataset, settings), strict=True):
        on_test = {"accuracy_flip": flipped}
        for teacher in teachers:
            on_test |= follows(run, teacher, dataset)
        found = scores(run, dataset) | {("test", metric): value for metric, value in on_test.items()}
        rows += _rows(named | {"arm": run.arm, "teachers": "+".join(run.teachers), "seed": run.seed}, found)
    return rows


def teacher_rows(task: int, teacher: Teacher, dataset: Dataset, settings: Settings) -> list[dict]:
    """Rows of results.csv of one fine-tuned network, all teacher seeds; the arm is its trained part."""
    named = {"task": str(task), "arm": teacher.trainable, "teachers": teacher.label, "labels": settings.train_size}
    named["epochs"] = teacher.settings.epochs
    return [row for run in teacher.runs for row in _rows(named | {"seed": run.seed}, scores(run, dataset))]


def ensemble_rows(task: int, runs: Sequence[TeacherRun], dataset: Dataset, settings: Settings) -> list[dict]:
    """Rows of results.csv of several teachers as one classifier (`teachers.ensemble`), which nothing is trained for."""
    named = {"task": str(task), "arm": "ensemble", "labels": settings.train_size, "epochs": 0}
    return [
        row for run in runs for row in _rows(named | {"teachers": run.label, "seed": run.seed}, scores(run, dataset))
    ]


def _rows(named: Mapping[str, Any], found: Scores) -> list[dict]:
    return [
        {**named, "split": part, "metric": metric, "value": f"{value:.6f}"}
        for (part, metric), value in sorted(found.items())
        if not math.isnan(value)  # a teacher that is never wrong has no errors to agree with
    ]


# --- recording ---


def finish(
    settings: Settings,
    notebook: str,
    rows: Sequence[dict],
    dataset: Dataset,
    teachers: Sequence[Teacher] = (),
    students: Iterable[Sequence[StudentRun]] = (),
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Record a notebook's rows, the facts about data and weights, and the times. Returns the path of results.csv.

    With both of the settings' teachers, `better_teacher` is that with the higher accuracy on validation images.
    facts: more entries of provenance.json, such as the constants of the losses used.
    """
    trained = [run for runs in students for run in runs]
    known: dict[str, Any] = {"data": dataset.facts, **(facts or {})}
    if teachers:
        known["weights"] = {teacher.label: teacher.facts for teacher in teachers}
    two = [teacher for teacher in teachers if teacher.settings in settings.teachers]
    if len(two) > 1:
        known["better_teacher"] = better_teacher(two).label
    made_of = {"data": dataset.checksum} | {f"{teacher.label} weights": teacher.checksum for teacher in teachers}
    made_of |= {_called(run, settings): run.fingerprint for run in trained}
    timings = [(f"{t.label}: features of every view", t.feature_seconds) for t in teachers if t.feature_seconds]
    timings += [(f"{t.label}: fine-tuning, seed {run.seed}", run.seconds) for t in teachers for run in t.runs]
    timings += [(f"student, {_called(run, settings)}", run.seconds) for run in trained]
    return record(settings, notebook, rows, known, timings, made_of)


def _called(run: StudentRun, settings: Settings) -> str:
    """A student's method and seed, and its epochs if they are not the settings': its name, and no other student's."""
    epochs = len(run.history["train_loss"])
    at = "" if epochs == settings.epochs else f", {counted(epochs, 'epoch')}"
    return f"{' '.join((run.arm, *run.teachers))}{at}, seed {run.seed}"


def record(
    settings: Settings,
    notebook: str,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    timings: Iterable[tuple[str, float]],
    made_of: Mapping[str, str],
) -> Path:
    """Write what a notebook found, and rewrite `results.csv`, `provenance.json` and `timings.csv`.

    They hold what all notebooks found under the present settings. `made_of` gives the checksums of what the rows depend
    on besides (data, weights, trained networks): a notebook that last ran with others of the same name is left out.
    Returns the path of `results.csv`.
    """
    folder = settings.run_folder
    made_of = {"settings": settings.digest(), **made_of}
    with lock(folder / "results.csv"):
        remove_cut_off(folder, "results", "timings", "provenance")
        remove_cut_off(folder / "found", notebook)
        mine = {"made_of": made_of, "rows": list(rows), "facts": dict(facts), "timings": list(timings)}
        mine["checksum"] = _json_checksum(mine)
        write_text(folder / "found" / f"{notebook}.json", json.dumps(mine, indent=1))
        found = _all_found(folder / "found", made_of)
        values = [[row[name] for name in RESULT_COLUMNS] for entry in found for row in entry["rows"]]
        results = _as_csv(RESULT_COLUMNS, values)
        write_text(folder / "results.csv", results)
        seconds = {stage: f"{took:.3f}" for entry in found for stage, took in entry["timings"]}
        write_text(folder / "timings.csv", _as_csv(("stage", "seconds"), seconds.items()))
        known = provenance(settings)
        for name, fact in (item for entry in found for item in entry["facts"].items()):
            known[name] = known.get(name, {}) | fact if isinstance(fact, dict) else fact
        known["results"] = results_checksum(results)
        write_text(folder / "provenance.json", json.dumps(known, indent=1) + "\n")
    return folder / "results.csv"


def _all_found(folder: Path, made_of: Mapping[str, str]) -> list[dict[str, Any]]:
    """What every notebook found, without the damaged files and those made of something else, of which a line tells."""
    found = []
    for path in sorted(folder.glob("*.json")):
        entry = _read_found(path)
        if entry is None:
            print(f"results.csv: leaves out {path.stem}, as {shown_path(path)} is damaged; run that notebook again")
            continue
        differing = [name for name, checksum in entry["made_of"].items() if made_of.get(name, checksum) != checksum]
        if differing:
            print(f"results.csv: leaves out {path.stem}, which last ran with other {', '.join(differing[:3])}")
        else:
            found.append(entry)
    return found


def _read_found(path: Path) -> dict[str, Any] | None:
    """What a notebook found, or None for a damaged file."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return entry if entry.pop("checksum", None) == _json_checksum(entry) else None
    except (ValueError, AttributeError, TypeError, RecursionError):  # no JSON, or that of something else
        return None


def _json_checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_csv(columns: Sequence[str], lines: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return text.getvalue()


# --- provenance ---


def provenance(settings: Settings) -> dict[str, Any]:
    """What a run's numbers depend on besides data and weights."""
    return {
        "settings": settings.identity(),
        "device": settings.device,
        "precision": settings.precision,
        "threads": settings.threads or torch.get_num_threads(),
        "processor": {"name": _processor(), "instruction_set": torch.backends.cpu.get_cpu_capability()},
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "commit": _commit(),
        "command": rerun_command(settings),
    }


def _processor() -> str:
    """The processor's name, as far as the system tells: "AMD EPYC 7763 64-Core Processor"."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def rerun_command(settings: Settings) -> str:
    """The command that runs the same again, with paths relative to the project's folder."""
    profile, given = read_profile(settings.profile), {}
    for name, value in settings.identity().items():
        usual = checked(name, profile[name]) if name in profile else default_of(name)
        if name not in ("teachers", "backbones") and value not in (None, usual):
            given[name] = value
    without = load_settings(settings.profile, **given, teachers=profile.get("teachers", settings.teachers))
    for name, kept in (("teachers", "teachers" in profile), ("backbones", True)):
        if not (kept and list(getattr(without, name)) == list(getattr(settings, name))):
            given[name] = [_short_record(teacher, settings) for teacher in getattr(settings, name)]
    if settings.threads is not None:  # another number of threads adds in another order
        given["threads"] = settings.threads
    words = ["python", "-m", "kdutils", "run", "--profile", shown_path(settings.profile)]
    for name, value in given.items():
        words += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def _short_record(teacher: TeacherSettings, settings: Settings) -> dict[str, Any] | str:
    """A teacher's record without what the settings say for all teachers; its name, if nothing else is left."""
    usual = {"label": teacher.name, "weights": settings.weights}
    values = dataclasses.asdict(teacher)
    usual |= {key: getattr(settings, f"teacher_{key}") for key in values.keys() - {"name", *usual}}
    record = {key: value for key, value in values.items() if key == "name" or value != usual[key]}
    return record if len(record) > 1 else teacher.name


def _commit() -> str:
    """The commit of the project's checkout, with `-dirty` if the code differs from it; 'unknown' outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=10)
    try:
        commit = run([*git, "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = run([*git, "status", "--porcelain", "--", "kdutils", "notebooks"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


# --- reading back ---


def results_checksum(text: str) -> str:
    """What `provenance.json` says of the `results.csv` beside it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_results(folder: Path) -> pd.DataFrame:
    """The rows of a run's results.csv, or of the committed report's. Raises `UserError` if there is none."""
    path = folder / "results.csv"
    if not path.is_file():
        raise UserError(
            f"results: there is no {shown_path(path)}; run the notebooks first (python -m kdutils run, "
            "with the same profile)"
        )
    return pd.read_csv(path, keep_default_na=False, dtype={"task": str})


def read_provenance(folder: Path) -> dict[str, Any]:
    """A run's provenance.json, or the committed report's. Raises `UserError` if it is missing or damaged."""
    path = folder / "provenance.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"report: {shown_path(path)} is missing or damaged; run the notebooks again (python -m kdutils run)"
        ) from error
