"""What trained models scored: rows for `results.csv`, the numbers behind the tables, the notes on data and weights."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from kdutils import metrics
from kdutils.data import Dataset
from kdutils.models import normalise
from kdutils.runs import artefact, record
from kdutils.settings import Settings, UserError, counted, shown_path
from kdutils.students import StudentRun, describe_builder
from kdutils.teachers import Teacher, TeacherRun
from kdutils.training import predict

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
        found = artefact(settings.run_folder / "costs", f"costs-{label.replace(' ', '_')}", key, make).facts
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
