"""What trained models scored: rows for `results.csv`, the numbers behind the tables, the notes on data and weights."""

import csv
import functools
import hashlib
import io
import json
import math
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from kdutils.cache import cached, describe_builder, lock, remove_cut_off, write_text
from kdutils.data.images import Dataset
from kdutils.models import normalise
from kdutils.results import metrics
from kdutils.settings import (
    ARCHITECTURES,
    ROOT,
    Settings,
    UserError,
    checked,
    counted,
    default_of,
    read_profile,
    shown_path,
)
from kdutils.students import StudentRun
from kdutils.teachers import Teacher, TeacherRun
from kdutils.training import predict

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


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
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


NUMBER = re.compile(
    r"(?P<whole>(< )?[-+−]?[\d,]+|–|)(?P<fraction>\.\d+)?(?P<unit>e[-+]?\d+|\s*%)?"
    r"(?: ± (?P<sd_whole>[\d,]+)(?P<sd_fraction>\.\d+)?)?"
)
_INTERVAL = re.compile(r"([-+−][\d.]+ )?(\[[-+−][\d.]+, [-+−][\d.]+\]|\(one seed\))|–|")


def is_right(column: pd.Series) -> bool:
    """Whether a column of texts goes to the right: numbers, or differences with their intervals."""
    return all(map(NUMBER.fullmatch, column)) or all(map(_INTERVAL.fullmatch, column))


def with_teachers(rows: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    """The rows, and once more as of the arm `teacher` those of the ResNets that teach, not of their other variants."""
    tuned = rows[rows.task == "2"]
    only_one = tuned.groupby("teachers").arm.transform("nunique") == 1
    part = tuned.teachers.map({arch: trained_part(arch, settings) for arch in ARCHITECTURES})
    return pd.concat([rows, tuned[only_one | (tuned.arm == part)].assign(arm="teacher")])


def trained_part(arch: str, settings: Mapping[str, Any]) -> str:
    """Which part of a ResNet the settings want trained, as the arms of task 2 are named; empty if they do not say."""
    return "all" if settings.get("weights") == "none" else settings.get(f"{arch}_trainable", "")


def _normal(results: pd.DataFrame) -> pd.DataFrame:
    return results.assign(teachers=results.teachers.fillna(""), task=results.task.astype(str))


def spread_of(column: pd.Series, per_cent: bool) -> dict[str, str]:
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


def as_words(value: Any, plain: bool = False) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(as_words(item, plain=True) for item in value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return str(value) if plain else f"{value:,}"
    if isinstance(value, float):
        return re.sub(r"e([-+])0+", r"e\1", f"{value:g}")
    return WORDS.get(str(value), str(value))


# --- the results table ---


def teacher_words(teachers: str) -> str:
    """The teachers of an arm, named in results.csv, in words."""
    return " + ".join(WORDS.get(name, name) for name in teachers.split("+"))


def arm_words(arm: str, teachers: str = "") -> str:
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
        accuracy = spread_of(by["accuracy"], per_cent=True)
        rows.append({
            "Task": task,
            "Model": model[:1].upper() + model[1:],
            "Teachers": teacher_words(teachers) or "–",
            **{name.capitalize(): as_words(value) for name, value in zip(varying, keys[3:], strict=True)},
            "Test accuracy (%)": accuracy["pm"],
            "Seeds": accuracy["n"],
            **({"NLL": spread_of(by["nll"], False)["mean"]} if "nll" in by else {}),
            **({"ECE (%)": f"{100 * by['ece'].mean():.1f}"} if "ece" in by else {}),
        })  # fmt: skip
    return pd.DataFrame(rows)


def text_table(frame: pd.DataFrame) -> str:
    """The frame for a terminal: a line a row, words to the left, numbers to the right."""
    texts = as_text(frame)
    lines = [list(texts.columns), *texts.values.tolist()]
    kinds = [">" if all(re.match(r"[-+−\d–]", cell) for cell in texts[name]) else "<" for name in texts]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    forms = [f"{kind}{width}" for kind, width in zip(kinds, widths, strict=True)]
    rows = ["  ".join(format(cell, form) for cell, form in zip(line, forms, strict=True)) for line in lines]
    return "\n".join(row.rstrip() for row in rows)


PARTS = ("train", "val", "test")
LONG = "long"
TASK_ARMS = ("scratch", "kd", "kd_mean_prob", "kd_mean_logit", "kd_confidence")  # the students of the four notebooks
FREEZE = "freeze_"  # begins the names of the study's arms that are ResNets
Scores = dict[tuple[str, str], float]
Run = StudentRun | TeacherRun


def scores(run: Run, dataset: Dataset) -> Scores:
    """Every measure of one trained model, by (part of the data, metric); accuracies are fractions."""
    found: Scores = {}
    for part in PARTS:
        logits, labels = run.logits[part], getattr(dataset, part).labels
        found |= {(part, metric): value for metric, value in metrics.evaluate(logits, labels).items()}
        found[part, "entropy"] = metrics.predictive_entropy(logits)
    macro = metrics.macro_scores(run.logits["test"], dataset.test.labels)
    return found | {("test", f"macro_{metric}"): value for metric, value in macro.items()}


def student_rows(
    task: int | str, runs: Sequence[StudentRun], dataset: Dataset, settings: Settings, teachers: Sequence[Teacher] = ()
) -> list[dict]:
    """Tidy rows of one arm, all seeds: its scores, those of test-time flipping (`accuracy_flip`), and on test images
    how it follows each of the teachers (`agreement_<arch>`, of which the teacher is right or wrong, and the
    divergence `kl_<arch>`)."""
    rows = []
    for run, flipped in zip(runs, flip_column(runs, dataset, settings), strict=True):
        found = scores(run, dataset) | {("test", "accuracy_flip"): flipped}
        for teacher in teachers:
            follows = _follows(run, teacher, dataset)
            found["test", f"kl_{teacher.arch}"] = follows.pop("kl")
            names = {part: "_".join(["agreement", teacher.arch, *part.split()]) for part in follows}
            found |= {("test", names[part].removesuffix("_all_images")): share for part, share in follows.items()}
        rows += _rows(task, run.arm, run.teachers, settings.epochs, run.seed, found, settings)
    return rows


def _follows(run: StudentRun, teacher: Teacher, dataset: Dataset) -> dict[str, float]:
    """How a student follows a teacher on the test images: agreement on "all images", those where "teacher right" and
    those where "teacher wrong"; "kl", from the teacher, in nats."""
    pair = run.logits["test"], teacher.run_for(run.seed).logits["test"]
    parts = metrics.agreement_by_teacher(*pair, dataset.test.labels)
    split = {part.replace("_", " "): share for part, share in parts.items()}
    return {"all images": metrics.agreement(*pair), **split, "kl": metrics.fidelity(*pair)}


def following(
    entries: Mapping[str, Sequence[StudentRun]], teachers: Mapping[str, Teacher], dataset: Dataset
) -> pd.DataFrame:
    """How students follow teachers on the test images, whoever taught them: a line each, mean ± sd over seeds.

    Columns: Student, Teacher (the keys of both mappings), the share of images with the same prediction, of all and of
    those that the teacher classifies right and wrong (`metrics.agreement`), and the divergence (`metrics.fidelity`).
    """
    lines = []
    for student, runs in entries.items():
        for name, teacher in teachers.items():
            found = pd.DataFrame([_follows(run, teacher, dataset) for run in runs])
            parts = {"Same prediction (%)": "all images", "Teacher right (%)": "teacher right",
                     "Teacher wrong (%)": "teacher wrong"}  # fmt: skip
            shares = {
                title: spread(found[part], percent=True) if found[part].notna().all() else "–"
                for title, part in parts.items()
            }
            lines.append({"Student": student, "Teacher": name, **shares, "KL (nats)": spread(found["kl"])})
    return pd.DataFrame(lines)


def teacher_rows(task: int, teacher: Teacher, dataset: Dataset, settings: Settings, prefix: str = "") -> list[dict]:
    """Tidy rows of one fine-tuned ResNet, all teacher seeds; the arm is what was trained of it, after the prefix."""
    arm, epochs = prefix + teacher.trainable, settings.of_teacher(teacher.arch, "epochs")
    return [
        row
        for run in teacher.runs
        for row in _rows(task, arm, (teacher.arch,), epochs, run.seed, scores(run, dataset), settings)
    ]


def _rows(task, arm, teachers, epochs, seed, found: Scores, settings: Settings) -> list[dict]:
    fixed = {
        "task": str(task), "arm": arm, "teachers": "+".join(teachers), "labels": settings.train_size,
        "epochs": epochs, "seed": seed,
    }  # fmt: skip
    return [
        {**fixed, "split": part, "metric": metric, "value": f"{value:.6f}"}
        for (part, metric), value in sorted(found.items())
        if not math.isnan(value)  # a teacher that is never wrong has no errors to agree with
    ]


def column(runs: Sequence[Run], dataset: Dataset, part: str, metric: str) -> list[float]:
    """One measure of every run, in the order of the seeds; `metric` as in `results.csv`."""
    measure = {
        "accuracy": metrics.accuracy, "nll": metrics.nll, "ece": metrics.ece,
        "entropy": lambda logits, labels: metrics.predictive_entropy(logits),
        "macro_f1": lambda logits, labels: metrics.macro_scores(logits, labels)["f1"],
    }[metric]  # fmt: skip
    return [measure(run.logits[part], getattr(dataset, part).labels) for run in runs]


def flip_column(runs: Sequence[StudentRun], dataset: Dataset, settings: Settings) -> list[float]:
    """Test accuracy of every run when it sees each image and its mirror image and its probabilities are averaged."""
    mirrored = normalise(dataset.test.images.flip(3))
    networks = [run.network().to(mirrored.device) for run in runs]
    of_mirrored = [predict(network, mirrored, settings.precision) for network in networks]
    return [
        metrics.accuracy(metrics.mean_probabilities([run.logits["test"], other]), dataset.test.labels)
        for run, other in zip(runs, of_mirrored, strict=True)
    ]


def right(runs: Sequence[Run], dataset: Dataset) -> Tensor:
    """Which test images each run classifies right: bool [runs, N]."""
    return torch.stack([metrics.correct(run.logits["test"], dataset.test.labels) for run in runs])


def spread(values: Sequence[float], percent: bool = False) -> str:
    """Mean and standard deviation as text; of fractions in per cent if asked."""
    factor, decimals = (100, 2) if percent else (1, 3)
    mean, deviation = metrics.mean_sd([factor * value for value in values])
    return f"{mean:.{decimals}f}" + (f" ± {deviation:.{decimals}f}" if len(values) > 1 else "")


def comparison(
    entries: Iterable[tuple[str, Sequence[Run]]],
    dataset: Dataset,
    baseline: Sequence[StudentRun] | None = None,
) -> pd.DataFrame:
    """One line a model: accuracies in per cent (mean ± sd over seeds), mean test NLL and ECE; with a baseline, also the
    difference of test accuracy to it, in points, with two 95 % intervals: over seeds, and over test images."""
    lines = []
    for label, runs in entries:
        line = {
            "Model": label,
            "Train (%)": spread(column(runs, dataset, "train", "accuracy"), percent=True),
            "Validation (%)": spread(column(runs, dataset, "val", "accuracy"), percent=True),
            "Test (%)": spread(column(runs, dataset, "test", "accuracy"), percent=True),
            "NLL": f"{metrics.mean_sd(column(runs, dataset, 'test', 'nll'))[0]:.3f}",
            "ECE (%)": f"{100 * metrics.mean_sd(column(runs, dataset, 'test', 'ece'))[0]:.1f}",
            "Seeds": len(runs),
        }
        if baseline is not None:
            is_student = isinstance(runs[0], StudentRun) and runs is not baseline
            line["Difference"] = difference_text(runs, baseline, dataset) if is_student else "–"
            line["Over images"] = bootstrap_text(runs, baseline, dataset) if is_student else "–"
        lines.append(line)
    return pd.DataFrame(lines)


def gains(
    entries: Mapping[str, tuple[Sequence[float], Sequence[Run]]], baseline: Sequence[Run], dataset: Dataset
) -> pd.DataFrame:
    """What students gain over the baseline against what their teacher knows, for `figures.gain_against_teacher`.

    entries: by label, the teacher's test accuracies (fractions), one a run of it, and the students it taught. Columns:
    label, accuracy, accuracy_low, accuracy_high (fractions), gain, low, high (points), with 95 % intervals.
    """
    lines = []
    for label, (accuracies, students) in entries.items():
        own = metrics.mean_interval(accuracies)
        gain = metrics.paired_difference(*(column(runs, dataset, "test", "accuracy") for runs in (students, baseline)))
        lines.append({
            "label": label, "accuracy": own.mean, "accuracy_low": own.low, "accuracy_high": own.high,
            "gain": 100 * gain.mean, "low": 100 * gain.low, "high": 100 * gain.high,
        })  # fmt: skip
    return pd.DataFrame(lines)


def difference_text(runs: Sequence[Run], baseline: Sequence[Run], dataset: Dataset) -> str:
    """Paired difference of test accuracies in points, with its 95 % confidence interval over seeds."""
    pairs = [[100 * value for value in column(r, dataset, "test", "accuracy")] for r in (runs, baseline)]
    found = metrics.paired_difference(*pairs)
    interval = f" [{found.low:+.2f}, {found.high:+.2f}]" if found.n > 1 else " (one seed)"
    return f"{found.mean:+.2f}{interval}".replace("-", "−")


def bootstrap_text(runs: Sequence[Run], baseline: Sequence[Run], dataset: Dataset) -> str:
    """The 95 % interval of the same difference, in points, over draws of the test images."""
    found = metrics.bootstrap_difference(*(right(r, dataset).cpu().numpy() for r in (runs, baseline)))
    return f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]".replace("-", "−")


def note(dataset: Dataset, *teachers: Teacher) -> str:
    """What every caption must say about data and weights that are not what the assignment names; else empty."""
    parts = []
    if dataset.is_generated:
        parts.append("Generated images: a demonstration.")
    elif not dataset.is_cifar10:
        parts.append(f"Images: {dataset.name}.")
    if any(teacher.is_standin for teacher in teachers):
        parts.append("Stand-in weights.")
    return " ".join(parts)


def model_costs(
    entries: Mapping[str, Callable[[], nn.Module]], dataset: Dataset, settings: Settings, repeats: int = 10
) -> pd.DataFrame:
    """What networks that take normalised 32x32 images cost, a row each: label, parameters, megabytes (float32, 10^6
    bytes), multiply_adds, latency (seconds an image, one at a time) and latency_batched (in batches of 100).

    `entries` gives by label what builds a network: a class or function, its arguments bound by `functools.partial`.
    Everything is measured once, and kept with the run.
    """
    lines = []
    for label, build in entries.items():
        key = {"what": "costs", "network": describe_builder(build), "device": settings.device}
        make = partial(_measure_costs, build, dataset, settings.device, repeats)
        found = cached(settings.run_folder / "costs", f"costs-{label.replace(' ', '_')}", key, make).facts
        lines.append({"label": label, **found})
    return pd.DataFrame(lines)[["label", "parameters", "megabytes", "multiply_adds", "latency", "latency_batched"]]


def _measure_costs(
    build: Callable, dataset: Dataset, device: str, repeats: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = build().to(device).eval()
    images = normalise(dataset.test.images[:100])
    parameters = metrics.parameter_count(model)
    return {}, {
        "parameters": parameters, "megabytes": parameters * 4 / 1e6,
        "multiply_adds": metrics.multiply_adds(model, (3, 32, 32)),
        "latency": metrics.latency(model, images[:1], repeats),
        "latency_batched": metrics.latency(model, images, repeats),
    }  # fmt: skip


def finish(
    settings: Settings,
    notebook: str,
    rows: Sequence[dict],
    dataset: Dataset,
    teachers: Sequence[Teacher] = (),
    students: Iterable[Sequence[StudentRun]] = (),
) -> Path:
    """Record a notebook's rows, the facts on data and weights, and the times; returns the path of results.csv."""
    facts: dict[str, Any] = {"data": dataset.facts}
    made_of = {"data": dataset.checksum} | {f"{teacher.arch} weights": teacher.checksum for teacher in teachers}
    trained = [run for arm in students for run in arm]
    made_of |= {_called(run, settings): run.fingerprint for run in trained}
    if teachers:
        facts["weights"] = {teacher.arch: teacher.facts for teacher in teachers}
    timings = [(f"{t.arch}: features of every view", t.feature_seconds) for t in teachers if t.feature_seconds]
    timings += [(f"{t.arch}: fine-tuning, seed {run.seed}", run.seconds) for t in teachers for run in t.runs]
    timings += [(f"student, {_called(run, settings)}", run.seconds) for run in trained]
    return record(settings, notebook, rows, facts, timings, made_of)


def _called(run: StudentRun, settings: Settings) -> str:
    """A student by its arm and seed, and by its epochs where they are not the settings': a name for no other one."""
    epochs = len(run.history["train_loss"])
    at = "" if epochs == settings.epochs else f", {counted(epochs, 'epoch')}"
    return f"{' '.join((run.arm, *run.teachers))}{at}, seed {run.seed}"


def read_results(folder: Path) -> pd.DataFrame:
    """The tidy rows of a run, or of the committed report. Raises `UserError` if there are none."""
    path = folder / "results.csv"
    if not path.is_file():
        raise UserError(
            f"results: there is no {shown_path(path)}; run the notebooks first (python -m kdutils run, "
            "with the same profile)"
        )
    return pd.read_csv(path, keep_default_na=False, dtype={"task": str})


def at_budget(results: pd.DataFrame, which: str, epochs: int | None) -> pd.DataFrame:
    """The rows of results.csv at one budget, so that an arm and its teachers name at most one set of runs.

    which: "" for the report's budget, `epochs`, or the only one an arm had (a fine-tuning's, say); `LONG` for the
    longest the student from scratch had, if that is longer; "extra" for the rows of the task `extra`.
    Raises `UserError` for an arm that was run at several budgets of which none is the report's.
    """
    results = results.assign(teachers=results.teachers.fillna(""), task=results.task.astype(str))
    is_extra = results.task == "extra"
    if which == "extra":
        return results[is_extra]
    if which == LONG:
        longest = results[~is_extra & (results.arm == "scratch")].epochs.max()
        return results[~is_extra & (results.epochs == longest) & (epochs is not None and longest > epochs)]
    results = results[~is_extra | is_extra.groupby([results.arm, results.teachers]).transform("all")]
    several = results.groupby(["arm", "teachers"]).epochs.transform("nunique") > 1
    at_epochs = results.epochs == epochs
    unclear = results[several & ~at_epochs.groupby([results.arm, results.teachers]).transform("any")]
    if len(unclear):
        arm, teachers = unclear.iloc[0][["arm", "teachers"]]
        budgets = sorted(unclear[(unclear.arm == arm) & (unclear.teachers == teachers)].epochs.unique().tolist())
        raise UserError(
            f"results: the arm {'/'.join(filter(None, (arm, teachers)))} was run for {budgets} epochs, and none of "
            f"them is the report's {epochs}; run it with that, too"
        )
    return results[~several | at_epochs]


def of_the_tasks(results: pd.DataFrame, epochs: int | None) -> pd.DataFrame:
    """The rows of results.csv about the classifiers of the four tasks at the report's budget, without the study's."""
    rows = at_budget(results, "", epochs)
    is_resnet = (rows.task == "2") & ~rows.arm.str.startswith(FREEZE)
    return rows[is_resnet | (rows.arm.isin(TASK_ARMS) & (rows.task != "extra"))]


def accuracy_frame(arms: dict[str, Sequence[Run]], dataset: Dataset) -> pd.DataFrame:
    """Test accuracy (a fraction) of every run: columns arm, label (the dictionary's key), seed, accuracy."""
    return pd.DataFrame([
        {"arm": label, "label": label, "seed": run.seed, "accuracy": accuracy}
        for label, runs in arms.items()
        for run, accuracy in zip(runs, column(runs, dataset, "test", "accuracy"), strict=True)
    ])  # fmt: skip


RESULT_COLUMNS = ("task", "arm", "teachers", "labels", "epochs", "seed", "split", "metric", "value")


def record(
    settings: Settings,
    notebook: str,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    timings: Iterable[tuple[str, float]],
    made_of: Mapping[str, str],
) -> Path:
    """Write what a notebook found, and make `results.csv`, `provenance.json` and `timings.csv` anew.

    They hold what all notebooks found under the present settings. `made_of` names what the rows depend on besides
    (data, weights, trained networks) by checksum; what another notebook found of other such things is left out.
    Returns the path of `results.csv`.
    """
    folder = settings.run_folder
    with lock(folder / "results.csv"):
        return _record(settings, notebook, rows, facts, timings, {"settings": settings.digest(), **made_of})


def _record(settings, notebook, rows, facts, timings, made_of) -> Path:
    folder = settings.run_folder
    remove_cut_off(folder, "results", "timings", "provenance")
    remove_cut_off(folder / "found", notebook)
    mine = {"made_of": made_of, "rows": list(rows), "facts": dict(facts), "timings": list(timings)}
    write_text(folder / "found" / f"{notebook}.json", json.dumps({**mine, "checksum": _json_checksum(mine)}, indent=1))
    found = []
    for path in sorted((folder / "found").glob("*.json")):
        entry = _read_found(path)
        if entry is None:
            print(f"results.csv: leaves out {path.stem}, as {shown_path(path)} is damaged; run that notebook again")
            continue
        differing = [name for name, checksum in entry["made_of"].items() if made_of.get(name, checksum) != checksum]
        if differing:
            print(f"results.csv: leaves out {path.stem}, which last ran with other {', '.join(differing[:3])}")
        else:
            found.append(entry)
    all_rows = [row for entry in found for row in entry["rows"]]
    results = _as_csv(RESULT_COLUMNS, [[row[c] for c in RESULT_COLUMNS] for row in all_rows])
    write_text(folder / "results.csv", results)
    all_timings = {stage: seconds for entry in found for stage, seconds in entry["timings"]}
    write_text(folder / "timings.csv", _as_csv(("stage", "seconds"), [(s, f"{t:.3f}") for s, t in all_timings.items()]))
    merged: dict[str, Any] = provenance(settings)
    for entry in found:
        merged |= entry["facts"]
    merged["results"] = results_checksum(results)
    write_text(folder / "provenance.json", json.dumps(merged, indent=1) + "\n")
    return folder / "results.csv"


def results_checksum(text: str) -> str:
    """What `provenance.json` says of the `results.csv` beside it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_found(path: Path) -> dict[str, Any] | None:
    """What a notebook found, or None for a damaged file."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return entry if entry.pop("checksum", None) == _json_checksum(entry) else None
    except (ValueError, AttributeError, TypeError, RecursionError):  # no JSON, or that of something else
        return None


def _json_checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_csv(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return text.getvalue()


def provenance(settings: Settings) -> dict[str, Any]:
    """What a run's numbers depend on besides data and weights: settings, versions, device, commit, command."""
    packages = ("torch", "torchvision", "numpy", "pandas", "papermill", "nbconvert")
    return {
        "settings": settings.identity(),
        "device": settings.device,
        "precision": settings.precision,
        "threads": settings.threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "commit": _commit(),
        "command": rerun_command(settings),
    }


def rerun_command(settings: Settings) -> str:
    """The command that runs the same again, with paths relative to the project's folder."""
    profile = read_profile(settings.profile)
    words = ["python", "-m", "kdutils", "run", "--profile", shown_path(settings.profile)]
    for name, value in settings.identity().items():
        if value is not None and value != (checked(name, profile[name]) if name in profile else default_of(name)):
            words += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    if settings.threads is not None:  # sums are rounded in another order by another number of threads
        words += ["-p", "threads", str(settings.threads)]
    return shlex.join(words)


def _commit() -> str:
    """The commit of the project's checkout, `-dirty` when the code differs from it; 'unknown' outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=10)
    try:
        commit = run([*git, "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = run([*git, "status", "--porcelain", "--", "kdutils", "notebooks"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


TRAINED_PARTS = ("last_layer", "last_block", "all")  # the arms that are ResNets: not paired with students


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _read_provenance(folder: Path) -> dict[str, Any]:
    path = folder / "provenance.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"report: {shown_path(path)} is missing or damaged; run the notebooks again (python -m kdutils run)"
        ) from error


def results_frame(folder: Path) -> pd.DataFrame:
    """The results table of a run or of the report, as the terminal, the README and notebook 04 show it."""
    return results_table(read_results(folder))


def times_table(folder: Path) -> pd.DataFrame:
    """What took how long in a run: a row a stage, all its seeds together, and the total."""
    times = pd.read_csv(folder / "timings.csv")
    by_stage = times.groupby(times.stage.str.replace(r", seed \d+$", "", regex=True), sort=False).seconds
    lines = [{"Stage": stage, "Times": len(seconds), "Took": minutes(seconds.sum())} for stage, seconds in by_stage]
    return pd.DataFrame([*lines, {"Stage": "total", "Times": len(times), "Took": minutes(times.seconds.sum())}])
