"""Sweeps: settings compared on validation images. A YAML file says what is tried, a CSV file holds the results."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kdutils.data.images import Dataset
from kdutils.results.metrics import paired_difference
from kdutils.results.tables import spread, with_interval
from kdutils.settings import ROOT, Settings, UserError, check_names, counted, read_yaml, shown_path
from kdutils.students import LOSSES
from kdutils.teachers import Teacher

SWEEPS = ROOT / "report" / "sweeps"
KINDS = ("teacher", *LOSSES)
METHOD = ("teachers", "rule")  # what a trial of a distilled student may name besides settings
RULES = ("mean_prob", "mean_logit", "confidence")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is tried. `trials` maps names to the settings that replace a profile's; the first trial is the baseline.

    what: `teacher`, or a student's loss (`kdutils.students.LOSSES`). Trials of a teacher name it by its label in
    `teachers`, and their settings `teacher_*` are its own. Trials of a distilled student name its `teachers`, joined by
    `+`, and the `rule` that combines two (default: `mean_prob`).
    """

    name: str
    title: str
    what: str
    folds: list[int]
    seeds: list[int]
    trials: dict[str, dict[str, Any]]
    baseline: str

    @property
    def caption(self) -> str:
        """What its table (`sweep_table`) shows."""
        over, guide = counted(len(self.seeds), "seed"), ""
        if len(self.folds) > 1:
            over = f"{len(self.folds)} folds of the labelled images and {over}"
            guide = " (a guide: the folds share training images)"
        return (
            f"{self.title}: accuracy on validation images, mean ± standard deviation over {over}; paired difference to "
            f"the baseline in points, with its 95 % confidence interval{guide}. Baseline: {self.baseline}."
        )


def is_distilled(what: str) -> bool:
    """Whether this kind of sweep trains students that have teachers."""
    return what in LOSSES and what != "scratch"


def read_sweep(path: Path) -> Sweep:
    """A sweep from its YAML file: title, what, folds, seeds, `fixed` settings and `grids`.

    A grid maps settings to lists of values and stands for all their combinations; `{}` is the fixed settings alone.
    The `teachers`, and the `rule` of a distilled student, stand beside `what`, or in a grid. The folds of students
    default to [0]. Raises `UserError` naming what does not fit.
    """
    content, where = read_yaml(path, "sweep"), f"sweep: {shown_path(path)}"
    needed = {"title": str, "what": str, "folds": list, "seeds": list, "grids": list}
    if content.get("what") in LOSSES:
        content = {"folds": [0], **content}
    for name, kind in needed.items():
        if not isinstance(content.get(name), kind) or not content[name]:
            raise UserError(f"{where} needs '{name}', a {'text' if kind is str else 'list'}")
    if unknown := content.keys() - needed.keys() - {*METHOD, "fixed"}:
        known = ", ".join((*needed, *METHOD))
        raise UserError(f"{where} has '{min(unknown, key=str)}'; use only {known} and fixed")
    fixed = content.get("fixed") or {}
    if not all(isinstance(part, dict) for part in (fixed, *content["grids"])):
        raise UserError(f"{where}: 'fixed' and each of 'grids' must map settings to values; write {{setting: values}}")
    if content["grids"][0] != {}:
        raise UserError(f"{where}: the first of 'grids' is the baseline; write {{}} there")
    method = {name: content[name] for name in METHOD if name in content}
    if isinstance(method.get("teachers"), list):
        method["teachers"] = "+".join(map(str, method["teachers"]))
    fixed = method | fixed
    trials = {name: trial for grid in content["grids"] for name, trial in combinations(grid, fixed, where).items()}
    baseline = ", ".join(f"{name} = {value}" for name, value in fixed.items()) or "the profile's settings"
    sweep = Sweep(path.stem, content["title"], content["what"], content["folds"], content["seeds"], trials, baseline)
    return check_sweep(sweep, where)


def combinations(grid: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """All trials of a grid, by name. Raises `UserError`, beginning with `where`, for an unknown or empty setting."""
    check_names([name for name in (*fixed, *grid) if name not in METHOD], where=where)
    values = [value if isinstance(value, list) else [value] for value in grid.values()]
    if not all(values):
        raise UserError(f"{where}: a setting has no value; give each of them at least one")
    if "profile" in {*fixed, *grid}:
        raise UserError(f"{where}: the profile is the same for all trials; give it with --profile")
    trials = [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*values)]
    names = [", ".join(f"{name} = {value}" for name, value in trial.items()) or "baseline" for trial in trials]
    return {name: {**fixed, **trial} for name, trial in zip(names, trials, strict=True)}


def check_sweep(sweep: Sweep, where: str) -> Sweep:
    """The sweep itself. Raises `UserError`, beginning with `where`, for what cannot be tried."""
    if sweep.what not in KINDS:
        raise UserError(f"{where}: what: {sweep.what!r} is not valid; use one of {', '.join(KINDS)}")
    for name, given in (("folds", sweep.folds), ("seeds", sweep.seeds)):
        if not all(type(v) is int and v >= 0 for v in given) or len(set(given)) < len(given):
            raise UserError(f"{where}: {name}: {given} is not valid; use different whole numbers, 0 or more")
    for trial in sweep.trials.values():
        if sweep.what == "scratch":
            if unfit := trial.keys() & {*METHOD}:
                raise UserError(f"{where}: {min(unfit)}: {sweep.what} has no teachers; leave it out")
            continue
        named, rule = str(trial.get("teachers", "")).split("+"), trial.get("rule", RULES[0])
        if not all(named) or len(set(named)) < len(named) or sweep.what == "teacher" and len(named) > 1:
            raise UserError(
                f"{where}: teachers: {trial.get('teachers')!r} is not valid; use the label of a teacher, or for a "
                "distilled student two joined by '+'"
            )
        if sweep.what == "teacher":
            continue
        if rule not in RULES:
            raise UserError(f"{where}: rule: {rule!r} is not valid; use one of {', '.join(RULES)}")
        if sweep.folds != [0]:
            raise UserError(
                f"{where}: folds: {sweep.folds} is not valid; the teachers were fine-tuned on images that other folds "
                "hold out: use [0]"
            )
    return sweep


def read_rows(path: Path) -> pd.DataFrame:
    """The rows that a sweep wrote."""
    return pd.read_csv(path, dtype={"weights": str, "data": str}, keep_default_na=False)


def labelled_checksum(dataset: Dataset) -> str:
    """Checksums of the images and labels that trials may see: training and validation."""
    return "+".join(dataset.part_checksums[part] for part in ("train", "val"))


def committed_sweeps(
    settings: Settings, dataset: Dataset, kinds: Collection[str], teachers: Sequence[Teacher] = ()
) -> list[tuple[Sweep, pd.DataFrame]]:
    """The sweeps of these kinds (`Sweep.what`) in `report/sweeps/<profile>`, with their rows.

    Only those that were run with these very images and with the weights of these teachers.
    """
    data, weights = labelled_checksum(dataset), {"", *(teacher.checksum for teacher in teachers)}
    found = []
    for path in sorted((SWEEPS / Path(settings.profile).stem).glob("*.yaml")):
        sweep = read_sweep(path)
        if sweep.what in kinds and path.with_suffix(".csv").is_file():
            rows = read_rows(path.with_suffix(".csv"))
            used = {checksum for joined in rows.weights for checksum in joined.split("+")}
            if used <= weights and set(rows.data) == {data}:
                found.append((sweep, rows))
    return found


def sweep_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per trial: validation accuracy (mean ± sd over folds and seeds) and the paired difference to the first.

    A trial with the settings of the first is left out, and so are intervals of fewer than three runs.
    """
    trials = {trial: group for trial, group in rows.groupby("trial", sort=False)}
    first = next(iter(trials.values()))
    lines = []
    for trial, group in trials.items():
        if group is not first and _runs(group).equals(_runs(first)):
            continue
        found = paired_difference(list(100 * group.val_accuracy), list(100 * first.val_accuracy))
        line = {"Trial": trial, "Validation (%)": spread(group.val_accuracy, percent=True)}
        line["Difference"] = "–" if group is first else with_interval(found)
        line |= {"NLL": f"{group.val_nll.mean():.3f}", "Train (%)": f"{100 * group.train_accuracy.mean():.1f}"}
        lines.append({**line, "Views": group.views.iloc[0], "Epochs": group.epochs.iloc[0], "n": len(group)})
    return pd.DataFrame(lines)


def _runs(group: pd.DataFrame) -> pd.DataFrame:
    return group.drop(columns="trial").reset_index(drop=True)


def settings_of_trials(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column for every numeric setting in the names of the trials (nan where a name has none)."""
    given = rows.trial.str.extractall(r"(?:^|, )(?P<name>\w+) = (?P<value>[-+.\de]+)(?=, |$)").reset_index(level=0)
    given = given.set_axis(["row", "name", "value"], axis=1).astype({"value": float})
    values = given.pivot(index="row", columns="name", values="value")
    return rows.join(values.drop(columns=rows.columns, errors="ignore"))  # rows have the epochs of every trial


def is_map(sweep: Sweep) -> bool:
    """Whether the trials are combinations of temperature and alpha, which `figures.setting_map` draws."""
    return any("temperature" in name and "alpha" in name for name in sweep.trials)
