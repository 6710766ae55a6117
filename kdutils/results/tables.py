"""Tables that people read: results in words, with standard deviations and intervals, from trained networks or from
the rows of `results.csv`."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from kdutils.data.images import Dataset
from kdutils.results import metrics
from kdutils.results.record import Run, column, follows, read_provenance, read_results, right
from kdutils.settings import UserError, counted
from kdutils.students import StudentRun
from kdutils.teachers import Teacher

LONG = "long"
NO_STUDENTS = ("last_layer", "last_block", "all", "ensemble")  # the teachers, one by one and both together
TASK_ARMS = (  # of the four notebooks
    "scratch", "scratch_equal_steps", "scratch_all_labels", *NO_STUDENTS, "kd", "kd_unlabelled", "kd_mean_prob",
    "kd_mean_logit", "kd_confidence", "kd_mean_prob_unlabelled",
)  # fmt: skip
WORDS = {
    "adam": "Adam",
    "adamw": "AdamW",
    "sgd": "SGD",
    "one_cycle": "one-cycle",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "tf_efficientnet_lite0": "EfficientNet-Lite0",
    "tf_efficientnet_lite1": "EfficientNet-Lite1",
    "tf_efficientnet_lite2": "EfficientNet-Lite2",
    "last_layer": "the last layer",
    "last_block": "the last block and the last layer",
    "all": "the whole network",
}
ARMS = {
    "scratch": "student from scratch",
    "scratch_equal_steps": "student from scratch, equal steps",
    "scratch_all_labels": "student from scratch, all labels",
    "ensemble": "both teachers as one classifier",
    "kd": "student distilled from one teacher",
    "kd_unlabelled": "student distilled, unlabelled images too",
    "kd_mean_prob": "student distilled, mean of probabilities",
    "kd_mean_logit": "student distilled, mean of logits",
    "kd_confidence": "student distilled, weighted by confidence",
    "kd_mean_prob_unlabelled": "student distilled, mean of probabilities, unlabelled images too",
    "no_label_smoothing": "student from scratch, no label smoothing",
    "kd_class_mean": "student distilled, soft labels averaged over each class",
    "dkd": "student distilled, DKD",
    "dist": "student distilled, DIST",
    "kd_standardized": "student distilled, logits standardised",
    "last_layer": "last layer fine-tuned",
    "last_block": "last block and last layer fine-tuned",
    "all": "whole network trained",
}


# --- words and numbers ---


def as_words(value: Any, plain: bool = False) -> str:
    """A setting or a fact as text. plain: whole numbers without groups of three digits."""
    if isinstance(value, (list, tuple)):
        return ", ".join(as_words(item, plain=True) for item in value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return str(value) if plain else f"{value:,}"
    if isinstance(value, float):
        return re.sub(r"e([-+])0+", r"e\1", f"{value:g}")
    return WORDS.get(str(value), str(value))


def teacher_words(teachers: str) -> str:
    """The teachers of a row of results.csv in words: "ResNet-50 + ResNet-18"."""
    return " + ".join(WORDS.get(name, name) for name in teachers.split("+"))


def arm_words(arm: str, teachers: str = "") -> str:
    """A method in words, with its teachers in brackets."""
    words = ARMS.get(arm, arm.replace("_", " "))
    return f"{words} ({teacher_words(teachers)})" if teachers else words


def minutes(seconds: float) -> str:
    """Minutes and seconds: "2:05 min"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def signed(number: float, decimals: int = 2) -> str:
    """A difference as text, always with its sign."""
    return f"{round(number, decimals) + 0.0:+.{decimals}f}".replace("-", "−")


def interval_text(difference: metrics.Difference) -> str:
    """The interval of a difference: "[−0.12, +1.30]"; a dash if there is none."""
    return "–" if math.isnan(difference.low) else f"[{signed(difference.low)}, {signed(difference.high)}]"


def with_interval(difference: metrics.Difference) -> str:
    """A difference and its interval: "+1.25 [+0.80, +1.70]"."""
    return f"{signed(difference.mean)} {interval_text(difference)}".removesuffix(" –")


def spread_of(values: Iterable[float], percent: bool) -> dict[str, str]:
    """Values over seeds as texts: mean, sd, pm ("mean ± sd"; the mean of a single seed), n, seeds ("5 seeds").

    percent: the values are fractions, the texts per cent.
    """
    scale, decimals = (100, 2) if percent else (1, 3)
    scaled = [scale * value for value in values]
    (mean, sd), n = metrics.mean_sd(scaled), len(scaled)
    known = {"mean": f"{mean:.{decimals}f}", "n": str(n), "seeds": counted(n, "seed")}
    if n == 1:
        return known | {"sd": "unknown", "pm": known["mean"]}
    return known | {"sd": f"{sd:.{decimals}f}", "pm": f"{known['mean']} ± {sd:.{decimals}f}"}


def spread(values: Iterable[float], percent: bool = False) -> str:
    """Mean and standard deviation as text, "69.53 ± 0.21"; of fractions in per cent if asked."""
    return spread_of(values, percent)["pm"]


# --- any frame as text ---

NUMBER = re.compile(
    r"(?P<whole>(< )?[-+−]?[\d,]+|–|)(?P<fraction>\.\d+)?(?P<unit>e[-+]?\d+|\s*%)?"
    r"(?: ± (?P<sd_whole>[\d,]+)(?P<sd_fraction>\.\d+)?)?"
)
_INTERVAL = re.compile(r"([-+−][\d.]+)?( ?\[[-+−][\d.]+, [-+−][\d.]+\])?|–")


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with texts in all cells: three decimals, groups of three digits in whole numbers, a dash for a missing
    value. An index other than 0, 1, 2, ... becomes the first column."""
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index(names=[name or "" for name in frame.index.names])
    names = [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in frame.columns]
    columns = [[_cell(value) for value in frame.iloc[:, i]] for i in range(frame.shape[1])]
    return pd.DataFrame(list(zip(*columns, strict=True)), columns=names, dtype=object)


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, (str, bool)) or not hasattr(value, "__round__"):
        return " ".join(str(value).split())
    return f"{value:.3f}" if isinstance(value, float) or not float(value).is_integer() else f"{value:,}"


def is_right(column: pd.Series) -> bool:
    """Whether a column of texts goes to the right: numbers, or differences with their intervals."""
    return all(map(NUMBER.fullmatch, column)) or all(map(_INTERVAL.fullmatch, column))


def text_table(frame: pd.DataFrame) -> str:
    """The frame for a terminal: one line per row, words to the left, numbers to the right."""
    texts = as_text(frame)
    lines = [list(texts.columns), *texts.values.tolist()]
    kinds = [">" if all(re.match(r"[-+−\d–]", cell) for cell in texts[name]) else "<" for name in texts]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    forms = [f"{kind}{width}" for kind, width in zip(kinds, widths, strict=True)]
    rows = ["  ".join(format(cell, form) for cell, form in zip(line, forms, strict=True)) for line in lines]
    return "\n".join(row.rstrip() for row in rows)


# --- tables of trained networks ---


def note(dataset: Dataset, *teachers: Teacher) -> str:
    """What every caption must say about data and weights other than the assignment's; else empty."""
    parts = []
    if dataset.is_generated:
        parts.append("Generated images: a demonstration.")
    elif not dataset.is_cifar10:
        parts.append(f"Images: {dataset.name}.")
    if any(teacher.is_standin for teacher in teachers):
        parts.append("Stand-in weights.")
    return " ".join(parts)


def comparison(
    entries: Iterable[tuple[str, Sequence[Run]]], dataset: Dataset, baseline: Sequence[StudentRun] | None = None
) -> pd.DataFrame:
    """One line per model: accuracies in per cent (mean ± sd over seeds), mean test NLL and ECE.

    With a baseline, also the difference of a student's test accuracy to it, in points, with two 95 % intervals: over
    seeds, and over test images.
    """
    lines = []
    for label, runs in entries:
        parts = {"Train (%)": "train", "Validation (%)": "val", "Test (%)": "test"}
        line: dict[str, Any] = {"Model": label}
        line |= {title: spread(column(runs, dataset, part, "accuracy"), percent=True) for title, part in parts.items()}
        line["NLL"] = spread_of(column(runs, dataset, "test", "nll"), percent=False)["mean"]
        line["ECE (%)"] = f"{100 * metrics.mean_sd(column(runs, dataset, 'test', 'ece'))[0]:.1f}"
        line["Seeds"] = len(runs)
        if baseline is not None:
            is_compared = isinstance(runs[0], StudentRun) and runs is not baseline
            line["Difference"] = difference_text(runs, baseline, dataset) if is_compared else "–"
            line["Over images"] = bootstrap_text(runs, baseline, dataset) if is_compared else "–"
        lines.append(line)
    return pd.DataFrame(lines)


def difference_text(runs: Sequence[Run], baseline: Sequence[Run], dataset: Dataset) -> str:
    """Paired difference of test accuracies in points, "+1.25 [+0.80, +1.70]": with its 95 % interval over three or
    more seeds."""
    a, b = ([100 * value for value in column(of, dataset, "test", "accuracy")] for of in (runs, baseline))
    return with_interval(metrics.paired_difference(a, b))


def bootstrap_text(runs: Sequence[Run], baseline: Sequence[Run], dataset: Dataset) -> str:
    """The 95 % interval of the same difference, in points, over draws of the test images."""
    found = metrics.bootstrap_difference(right(runs, dataset).numpy(), right(baseline, dataset).numpy())
    return interval_text(metrics.Difference(100 * found.mean, 100 * found.low, 100 * found.high, found.n))


def following(
    entries: Mapping[str, Sequence[StudentRun]], teachers: Mapping[str, Teacher], dataset: Dataset
) -> pd.DataFrame:
    """How students follow teachers on the test images, whoever taught them: a line each, mean ± sd over seeds.

    Columns: Student, Teacher (the keys of both mappings); the share of images with the same prediction, of all and of
    those that the teacher classifies right and wrong; the divergence from the teacher (see `record.follows`).
    """
    lines = []
    for student, runs in entries.items():
        for label, teacher in teachers.items():
            found = pd.DataFrame([follows(run, teacher, dataset) for run in runs])
            name, kl = f"agreement_{teacher.label}", f"kl_{teacher.label}"
            columns = {"Same prediction (%)": name, "Teacher right (%)": f"{name}_teacher_right"}
            columns["Teacher wrong (%)"] = f"{name}_teacher_wrong"
            shares = {
                title: "–" if found[of].isna().any() else spread(found[of], percent=True)
                for title, of in columns.items()
            }
            lines.append({"Student": student, "Teacher": label, **shares, "KL (nats)": spread(found[kl])})
    return pd.DataFrame(lines)


def accuracy_frame(arms: Mapping[str, Sequence[Run]], dataset: Dataset) -> pd.DataFrame:
    """Test accuracy (a fraction) of every run: columns arm, label (the mapping's key), seed, accuracy."""
    return pd.DataFrame(
        [
            {"arm": label, "label": label, "seed": run.seed, "accuracy": accuracy}
            for label, runs in arms.items()
            for run, accuracy in zip(runs, column(runs, dataset, "test", "accuracy"), strict=True)
        ]
    )


# --- tables of results.csv ---


def at_epochs(results: pd.DataFrame, which: str, epochs: int | None) -> pd.DataFrame:
    """The rows of results.csv at one number of epochs, so that a method and its teachers name one set of runs.

    which: "" for the report's `epochs`, or the only number an arm was trained for (a fine-tuning, a student with
    unlabelled images); `LONG` for the largest number of the student from scratch, if that is larger.
    Raises `UserError` for an arm that was trained for several numbers of epochs, the report's not among them.
    """
    results = _normal(results)
    if which == LONG:
        longest = results[results.arm == "scratch"].epochs.max()
        return results[(results.epochs == longest) & (epochs is not None and longest > epochs)]
    several = results.groupby(["arm", "teachers"]).epochs.transform("nunique") > 1
    at_epochs = results.epochs == epochs
    unclear = results[several & ~at_epochs.groupby([results.arm, results.teachers]).transform("any")]
    if len(unclear):
        arm, teachers = unclear.iloc[0][["arm", "teachers"]]
        found = sorted(unclear[(unclear.arm == arm) & (unclear.teachers == teachers)].epochs.unique().tolist())
        raise UserError(
            f"results: {'/'.join(filter(None, (arm, teachers)))} was run for {found} epochs, and none of them is the "
            f"report's {epochs}; run it for {epochs} epochs, too"
        )
    return results[~several | at_epochs]


def _normal(results: pd.DataFrame) -> pd.DataFrame:
    return results.assign(teachers=results.teachers.fillna(""), task=results.task.astype(str))


def of_the_tasks(results: pd.DataFrame, epochs: int | None) -> pd.DataFrame:
    """The rows of results.csv about the classifiers of the four tasks at the report's epochs, not the study's: those
    of its arms, and of other teachers than the two that taught one student together."""
    rows = at_epochs(results, "", epochs)
    rows = rows[rows.task.isin(("1", "2", "3", "4")) & rows.arm.isin(TASK_ARMS)]
    both = set(rows[rows.arm == "kd_mean_prob"].teachers)
    names = {"", *both, *(name for joined in both for name in joined.split("+"))}
    return rows[rows.teachers.isin(names)] if both else rows


def roles(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The labels of a run's two teachers by role: `first` and `second` as the settings name them, `both` of them,
    `better` and `lesser` by their accuracy on validation images. Empty where the provenance names no two."""
    teachers = [teacher["label"] for teacher in provenance.get("settings", {}).get("teachers", ())]
    if len(teachers) != 2:
        return {}
    better = provenance.get("better_teacher", teachers[0])
    (lesser,) = {*teachers} - {better}
    return {
        "first": teachers[0], "second": teachers[1], "both": "+".join(teachers), "better": better, "lesser": lesser
    }  # fmt: skip


def trained_part(label: str, settings: Mapping[str, Any]) -> str:
    """The trained part of a teacher by the settings, as the arms of task 2 are named; empty if they do not say."""
    for teacher in (*settings.get("teachers", ()), *settings.get("backbones", ())):
        if teacher["label"] == label:
            return "all" if teacher["weights"] == "none" else teacher["trainable"]
    return ""


def with_teachers(rows: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    """The rows, and once more, as of the arm `teacher`, those of the networks that teach, not of their variants."""
    tuned = rows[rows.task == "2"]
    only_one = tuned.groupby("teachers").arm.transform("nunique") == 1
    part = tuned.teachers.map(lambda label: trained_part(label, settings))
    return pd.concat([rows, tuned[only_one | (tuned.arm == part)].assign(arm="teacher")])


def results_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per method, in words: mean and standard deviation over its seeds of the test accuracy; NLL; ECE.

    What a later task repeats of an earlier one, to compare with, is shown once.
    """
    test = _normal(results[results.split == "test"]).sort_values("task", kind="stable")
    test = test.drop_duplicates(["arm", "teachers", "labels", "epochs", "seed", "metric"])
    counts = test.groupby(["arm", "teachers"])[["labels", "epochs"]].nunique()
    varying = [str(name) for name in counts if counts[name].max() > 1]
    rows = []
    keys: Any  # texts: pandas-stubs says Hashable
    for keys, group in test.groupby(["task", "arm", "teachers", *varying], sort=False):
        task, arm, teachers = keys[:3]
        by = {metric: of.value for metric, of in group.groupby("metric")}
        model = arm_words(arm)
        if task == "2":
            model, teachers = f"{teacher_words(teachers)}, {model}", ""
        accuracy = spread_of(by["accuracy"], percent=True)
        row = {"Task": task, "Model": model[:1].upper() + model[1:], "Teachers": teacher_words(teachers) or "–"}
        row |= {name.capitalize(): as_words(value) for name, value in zip(varying, keys[3:], strict=True)}
        row |= {"Test accuracy (%)": accuracy["pm"], "Seeds": accuracy["n"]}
        row |= {"NLL": spread_of(by["nll"], percent=False)["mean"]} if "nll" in by else {}
        row |= {"ECE (%)": f"{100 * by['ece'].mean():.1f}"} if "ece" in by else {}
        rows.append(row)
    return pd.DataFrame(rows)


def outcome(results: pd.DataFrame, provenance: Mapping[str, Any]) -> list[str]:
    """What came out, in sentences for a person who knows nothing of it: mean test accuracies of the teachers, of the
    student from scratch and of the one taught by both; then the `warnings`.

    From scratch is the student that is best on validation images and, where that is another one, that of equal steps.
    """
    found, two = _mean_accuracies(results, provenance), roles(provenance)
    teachers = [f"{teacher_words(names)} {_percent(mean)}" for names, mean in _teachers(found, two).items()]
    lines = [f"Test accuracy, mean over seeds. The teachers: {', '.join(teachers)}."] if teachers else []
    said = []
    if best := _best_from_scratch(results):
        said.append(f"From scratch {_percent(best[1])}")
        equal = found.get(("scratch_equal_steps", ""))
        if equal is not None and best[0] != "scratch_equal_steps":
            said[0] += f" ({_percent(equal)} in equal steps)"
    count = provenance.get("data", {}).get("unlabelled", 0)
    words = {"kd_mean_prob": "", "kd_mean_prob_unlabelled": f", with {count:,} unlabelled images"}
    both = [(words[arm], mean) for (arm, _), mean in found.items() if arm in words]
    said += [f"Taught by both teachers{more}: {_percent(mean)}" for more, mean in both]
    return [*lines, *([". ".join(said) + "."] if said else []), *warnings(results, provenance)]


def warnings(results: pd.DataFrame, provenance: Mapping[str, Any]) -> list[str]:
    """A sentence with its remedy for each of the two teachers that is worse on test images than the student from
    scratch."""
    teachers, best = _teachers(_mean_accuracies(results, provenance), roles(provenance)), _best_from_scratch(results)
    return [
        f"Warning: on the test images the teacher {teacher_words(names)} ({_percent(mean)}) is worse than the student "
        f"from scratch ({_percent(best[1])}): it cannot teach it. Choose another teacher, give it pretrained weights "
        "(weights) or larger images (teacher_size), or fine-tune it for longer (teacher_epochs)."
        for names, mean in teachers.items()
        if best and mean < best[1]
    ]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _mean_accuracies(results: pd.DataFrame, provenance: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Mean test accuracy over seeds, by arm and teachers, at the report's epochs; fine-tuned ones as `teacher`, too."""
    settings = provenance.get("settings", {})
    rows = with_teachers(at_epochs(results, "", settings.get("epochs")), settings)
    rows = rows[(rows.metric == "accuracy") & (rows.split == "test")]
    return rows.drop_duplicates(["arm", "teachers", "seed"]).groupby(["arm", "teachers"]).value.mean().to_dict()


def _teachers(means: Mapping[tuple[str, str], float], two: Mapping[str, str]) -> dict[str, float]:
    """Those of the two teachers, in the settings' order."""
    return {
        two[role]: means["teacher", two[role]] for role in ("first", "second") if ("teacher", two.get(role)) in means
    }


def _best_from_scratch(results: pd.DataFrame) -> tuple[str, float] | None:
    """Arm and mean test accuracy of the student from scratch that is best on validation images, of any epochs."""
    rows = results[results.arm.isin(("scratch", "scratch_equal_steps")) & (results.metric == "accuracy")]
    means = rows.groupby(["arm", "epochs", "split"]).value.mean().unstack("split")
    if not {"val", "test"} <= {*means}:
        return None
    best = means.val.idxmax()
    return best[0], means.test[best]


def times_table(folder: Path) -> pd.DataFrame:
    """The times of a run: one row per stage, all its seeds together, and their sum, which is more than the run's time
    where seeds were trained side by side."""
    times = pd.read_csv(folder / "timings.csv")
    by_stage = times.groupby(times.stage.str.replace(r", seed \d+$", "", regex=True), sort=False).seconds
    lines = [{"Stage": stage, "Times": len(seconds), "Took": minutes(seconds.sum())} for stage, seconds in by_stage]
    return pd.DataFrame([*lines, {"Stage": "sum", "Times": len(times), "Took": minutes(times.seconds.sum())}])


def arms_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per method: its measures, mean ± sd over seeds, and its difference to the student from scratch.

    The difference is of test accuracies, in points, of the seeds that both have.
    """
    columns = {"Train (%)": "train/accuracy", "Validation (%)": "val/accuracy", "Test (%)": "test/accuracy"}
    columns |= {"Test macro F1": "test/macro_f1", "Test entropy": "test/entropy"}
    rows = rows.assign(measure=rows.split + "/" + rows.metric).set_index("seed")
    is_scratch = (rows.arm == "scratch") & (rows.measure == "test/accuracy")
    scratch, lines = rows.value[is_scratch], []
    keys: Any  # texts: pandas-stubs says Hashable
    for keys, group in rows.groupby(["arm", "teachers"], sort=False):
        found = dict(list(group.groupby("measure").value))
        line = {"Arm": keys[0], "Teachers": keys[1] or "–"}
        line |= {name: spread(found[of], "accuracy" in of) if of in found else "–" for name, of in columns.items()}
        seeds = scratch.index.intersection(found["test/accuracy"].index)
        is_compared = len(seeds) and keys[0] not in (*NO_STUDENTS, "scratch")
        pair = (100 * accuracy[seeds] for accuracy in (found["test/accuracy"], scratch))
        lines.append(
            line | {"Against scratch": with_interval(metrics.paired_difference(*pair)) if is_compared else "–"}
        )
    return pd.DataFrame(lines)


def run_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The results of a run or of the report, by title; `folder` holds rows, provenance and times."""
    results, settings = read_results(folder), read_provenance(folder).get("settings", {})
    rows = at_epochs(results, "", settings.get("epochs")).sort_values("task", kind="stable")
    tables = {
        "Test images": results_table(results),
        "Each part of the data; test accuracy against scratch in points, paired by seed": arms_table(rows),
        "Wall time": times_table(folder),
    }
    return {title: table for title, table in tables.items() if len(table)}


def layer_table(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What torchsummary prints, as two tables: the layers, and the memory for one image in MB (2^20 bytes, float32).

    `input_shape` is that of one image, without the batch. The forward and backward pass counts every layer's output
    twice, as torchsummary does.
    """
    layers: list[dict] = []

    def note_layer(module: nn.Module, _: tuple, output: Tensor) -> None:
        name, shape = f"{type(module).__name__}-{len(layers) + 1}", [-1, *output.shape[1:]]
        count = sum(p.numel() for p in module.parameters())
        layers.append({"Layer": name, "Output shape": shape, "Parameters": count})

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(note_layer) for module in leaves]
    device = next(model.parameters()).device
    with torch.no_grad():
        model(torch.zeros(1, *input_shape, device=device))
    for hook in hooks:
        hook.remove()
    numbers = {
        "Input": math.prod(input_shape),
        "Forward and backward pass": 2 * sum(-math.prod(layer["Output shape"]) for layer in layers),
        "Parameters": sum(layer["Parameters"] for layer in layers),
    }
    megabytes = {name: count * 4 / 2**20 for name, count in numbers.items()}
    megabytes["Estimated total"] = sum(megabytes.values())
    memory = pd.DataFrame({"Memory": list(megabytes), "MB": [f"{value:.2f}" for value in megabytes.values()]})
    total = {"Layer": "Total", "Output shape": "", "Parameters": numbers["Parameters"]}
    table = pd.DataFrame([*layers, total])
    table["Output shape"] = table["Output shape"].astype(str)
    table["Parameters"] = table["Parameters"].map("{:,}".format)
    return table, memory
