"""Sweeps: settings tried out on validation images alone, every trial over the same folds and seeds."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from kdutils.cache import check_writable, write_text
from kdutils.data.images import Dataset, load_data, rotate_validation
from kdutils.data.views import view_table
from kdutils.parallel import check_cluster, run_jobs
from kdutils.results.metrics import mean_sd, paired_difference
from kdutils.settings import (
    ARCHITECTURES,
    ROOT,
    Settings,
    UserError,
    apply_threads,
    check_names,
    checked,
    counted,
    load_settings,
    read_yaml,
    shown_path,
)
from kdutils.students import LOSSES, fit_student, named_method
from kdutils.teachers import FineTuning, Teacher, fine_tune, prepare_fine_tuning, try_fine_tuning

COLUMNS = (
    "what", "data", "weights", "trial", "fold", "seed", "views", "epochs", "val_accuracy", "val_nll", "train_accuracy",
    "seconds",
)  # fmt: skip
SWEEPS = ROOT / "report" / "sweeps"
ARM = ("teachers", "rule")  # what a taught student's trial may name besides settings
RULES = ("mean_prob", "mean_logit", "confidence")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is tried: `trials` gives by name the settings that replace a profile's; all are compared with the first.

    what: a ResNet, which is fine-tuned, or a student's loss (`kdutils.students.LOSSES`). The trials of a student that
    is taught also name its `teachers`, joined by `+`, and the `rule` that combines two (`mean_prob` if left out).
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
        over = f"{len(self.folds)} folds of the labelled images and " if len(self.folds) > 1 else ""
        over += counted(len(self.seeds), "seed")
        guide = " (a guide: the folds share training images)" if len(self.folds) > 1 else ""
        return (
            f"{self.title}: accuracy on validation images, mean ± standard deviation over {over}; paired difference "
            f"to the baseline in points, with its 95 % confidence interval{guide}. Baseline: {self.baseline}."
        )


def read_sweep(path: Path) -> Sweep:
    """A sweep from its YAML file: title, what, folds, seeds, `fixed` settings and `grids`.

    A grid maps settings to lists of values and stands for all their combinations; `{}` is the fixed settings alone.
    A taught student's `teachers` and `rule` stand beside `what`, or in a grid. A student's folds may be left out: [0].
    Raises `UserError` naming what does not fit.
    """
    content, where = read_yaml(path, "sweep"), f"sweep: {shown_path(path)}"
    wanted = {"title": str, "what": str, "folds": list, "seeds": list, "grids": list}
    if content.get("what") in LOSSES:
        content = {"folds": [0], **content}
    for name, kind in wanted.items():
        if not isinstance(content.get(name), kind) or not content[name]:
            raise UserError(f"{where} needs '{name}', a {'text' if kind is str else 'list'}")
    if odd := content.keys() - wanted.keys() - {*ARM, "fixed"}:
        known = ", ".join((*wanted, *ARM))
        raise UserError(f"{where} has '{min(odd, key=str)}'; known are {known} and fixed")
    fixed = content.get("fixed") or {}
    if not all(isinstance(part, dict) for part in (fixed, *content["grids"])) or content["grids"][0] != {}:
        raise UserError(f"{where}: fixed and grids hold 'setting: values'; the first grid is {{}}, the baseline")
    arm = {name: content[name] for name in ARM if name in content}
    if isinstance(arm.get("teachers"), list):
        arm["teachers"] = "+".join(map(str, arm["teachers"]))
    fixed = arm | fixed
    trials = {name: trial for grid in content["grids"] for name, trial in _combinations(grid, fixed, where).items()}
    baseline = ", ".join(f"{name} = {value}" for name, value in fixed.items()) or "the profile's settings"
    sweep = Sweep(path.stem, content["title"], content["what"], content["folds"], content["seeds"], trials, baseline)
    return _checked(sweep, where)


def grid_sweep(what: str, grid: Sequence[str], seeds: list[int]) -> Sweep:
    """The sweep of one grid, given as `NAME=VALUE,VALUE,...` for each setting; its first combination is the baseline.

    Besides settings, `teachers` (ResNet-18, if left out) and `rule` of a taught student and `seeds` can be named.
    Raises `UserError` naming what does not fit.
    """
    values: dict[str, Any] = {}
    for text in grid:
        name, _, listed = (part.strip() for part in text.partition("="))
        if not listed or name in values:
            raise UserError(f"--grid: {text!r} will not do; write NAME=VALUE,VALUE,..., every name once")
        values[name] = [value.strip() for value in listed.split(",")]
    if "seeds" in values:
        seeds = checked("seeds", f"[{','.join(values.pop('seeds'))}]", "--grid seeds")
    arm = {"teachers": "resnet18"} if _is_taught(what) and "teachers" not in values else {}
    trials = _combinations(values, arm, "--grid")
    name = "-".join([what, *values])
    return _checked(Sweep(name, name, what, [0], seeds, trials, next(iter(trials))), "--grid")


def _is_taught(what: str) -> bool:
    return what in LOSSES and what != "scratch"


def _combinations(grid: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """All trials of a grid, by name."""
    check_names([name for name in (*fixed, *grid) if name not in ARM], where=where)
    values = [value if isinstance(value, list) else [value] for value in grid.values()]
    if not all(values) or "profile" in {*fixed, *grid}:
        raise UserError(f"{where}: give every setting a value, and the profile with --profile")
    trials = [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*values)]
    return {
        ", ".join(f"{name} = {value}" for name, value in trial.items()) or "baseline": {**fixed, **trial}
        for trial in trials
    }


def _checked(sweep: Sweep, where: str) -> Sweep:
    kinds = (*ARCHITECTURES, *LOSSES)
    if sweep.what not in kinds:
        raise UserError(f"{where}: what is {sweep.what!r}; it must be one of {', '.join(kinds)}")
    for name, given in (("folds", sweep.folds), ("seeds", sweep.seeds)):
        if not all(type(v) is int and v >= 0 for v in given) or len(set(given)) < len(given):
            raise UserError(f"{where}: {name} must be different whole numbers, 0 or above")
    for trial in sweep.trials.values():
        if not _is_taught(sweep.what):
            if odd := trial.keys() & {*ARM}:
                raise UserError(f"{where}: {min(odd)}: {sweep.what} is not taught; leave it out")
            continue
        named = str(trial.get("teachers", "")).split("+")
        if not set(named) <= {*ARCHITECTURES} or len(set(named)) < len(named):
            raise UserError(
                f"{where}: teachers: {'+'.join(named)!r} will not do; name one, or two joined by '+', of "
                f"{', '.join(ARCHITECTURES)}"
            )
        if trial.get("rule", RULES[0]) not in RULES:
            raise UserError(f"{where}: rule: {trial['rule']!r} will not do; it must be one of {', '.join(RULES)}")
        if sweep.folds != [0]:
            raise UserError(
                f"{where}: folds: the teachers were fine-tuned on images that other folds hold out; leave folds at [0]"
            )
    return sweep


def run_sweep(
    sweep: Sweep, profile: str, parameters: Mapping[str, Any], out: Path, workers: int = 1,
    scheduler: str | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Try every trial on every fold and seed, and write the rows to `out` at the end; nothing is tried twice.

    `workers` and `scheduler` say where, as in `kdutils.parallel.run_jobs`. What trials share - teachers, features - is
    made before the first of them starts. Raises `UserError` for unfit settings before anything is trained.
    """
    if any(trial.keys() & {"data", "train_size", "val_size", "split_seed"} for trial in sweep.trials.values()):
        raise UserError(f"sweep: {sweep.name} changes the data; every trial must see the same images")
    settings, arms = {}, {}
    for name, values in sweep.trials.items():
        changes = {setting: value for setting, value in values.items() if setting not in ARM}
        settings[name] = load_settings(profile, **{**parameters, **changes})
        named = str(values.get("teachers", "")).split("+")
        arms[name] = [arch for arch in ARCHITECTURES if arch in named], values.get("rule", RULES[0])
    first = next(iter(settings.values()))
    apply_threads(first)
    check_writable(out.parent, "--out")
    if scheduler:
        check_cluster(scheduler)
    images = json.dumps(dataclasses.asdict(first))
    folds = {fold: rotate_validation(_images(images), fold) for fold in sweep.folds}
    made = set()
    for trial, used in settings.items():
        for dataset in folds.values() if sweep.what in ARCHITECTURES else ():
            prepare_fine_tuning(sweep.what, dataset, used, sweep.seeds)
        for arch in arms[trial][0]:
            path = FineTuning(arch, folds[0], used).logits_path
            if path not in made:
                fine_tune(arch, folds[0], used)
                made.add(path)
    jobs, rows = {}, []
    known: dict[str, str] = {}
    for (trial, used), fold, seed in itertools.product(settings.items(), sweep.folds, sweep.seeds):
        name = f"{trial}, fold {fold}, seed {seed}"
        same = known.setdefault(json.dumps([arms[trial], used.identity(), fold, seed]), name)
        if same == name:
            jobs[name] = partial(_try, sweep.what, *arms[trial], used, images, fold, seed)
        rows.append((trial, same))
    found = run_jobs(jobs, workers, scheduler, title="sweep")
    frame = pd.DataFrame([{**found[name], "trial": trial} for trial, name in rows], columns=COLUMNS)
    write_text(out, frame.to_csv(index=False))
    return read_rows(out)


@functools.lru_cache(maxsize=1)
def _images(settings: str) -> Dataset:
    """The data set of settings in JSON; kept, because all trials of a sweep see the same."""
    return load_data(Settings(**json.loads(settings)))


def _try(
    what: str, teachers: list[str], rule: str, settings: Settings, images: str, fold: int, seed: int
) -> dict[str, Any]:
    """One trial's row."""
    dataset = rotate_validation(_images(images), fold)
    if what in ARCHITECTURES:
        found = try_fine_tuning(what, dataset, settings, seed)
        weights, views = found.facts["weights"], found.facts["trained_views"]
    else:
        taught_by = [fine_tune(arch, dataset, settings) for arch in teachers]
        arm = named_method(what, settings, taught_by, rule)
        found = fit_student(arm, dataset, settings, seed)
        what = " ".join([arm.name, *teachers])
        weights, views = "+".join(teacher.checksum for teacher in taught_by), len(view_table(**settings.views))
    history = found.facts["history"]
    return {
        "what": what, "data": labelled_checksum(_images(images)), "weights": weights, "fold": fold, "seed": seed,
        "views": views,
        "epochs": len(history["val_accuracy"]), "val_accuracy": f"{history['val_accuracy'][-1]:.6f}",
        "val_nll": f"{history['val_loss'][-1]:.6f}", "train_accuracy": f"{history['train_accuracy'][-1]:.6f}",
        "seconds": f"{found.seconds:.1f}",
    }  # fmt: skip


def try_grid(what: str, grid: Sequence[str], settings: Settings) -> list[tuple[Sweep, pd.DataFrame]]:
    """Try a grid (`grid_sweep`) with the settings' seeds, and all else as in these settings: the sweep and its rows.

    Raises `UserError` for what does not fit, before anything is trained.
    """
    sweep = grid_sweep(what, grid, settings.seeds)
    parameters = {name: value for name, value in dataclasses.asdict(settings).items() if name != "profile"}
    out = settings.run_folder / "sweeps" / f"{sweep.name}.csv"
    return [(sweep, run_sweep(sweep, settings.profile, parameters, out))]


def read_rows(path: Path) -> pd.DataFrame:
    """The rows that a sweep wrote."""
    return pd.read_csv(path, dtype={"weights": str, "data": str}, keep_default_na=False)


def labelled_checksum(dataset: Dataset) -> str:
    """Checksums of the images and labels that trials may see."""
    return "+".join(dataset.part_checksums[part] for part in ("train", "val"))


def settings_of_trials(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column for every numeric setting that a trial's name gives (nan where it gives none)."""
    given = frame.trial.str.extractall(r"(?:^|, )(?P<name>\w+) = (?P<value>[-+.\de]+)(?=, |$)").reset_index(level=0)
    given = given.set_axis(["row", "name", "value"], axis=1).assign(value=lambda found: found.value.astype(float))
    return frame.join(given.pivot(index="row", columns="name", values="value"))


def sweep_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a trial: validation accuracy (mean ± sd over folds and seeds) and the paired difference to the first.

    A trial that has the first one's settings is not shown again; intervals of fewer than three runs say nothing and are
    left out.
    """
    lines = []
    groups = {trial: group for trial, group in frame.groupby("trial", sort=False)}
    first = next(iter(groups.values()))
    for trial, group in groups.items():
        if group is not first and _runs_of(group).equals(_runs_of(first)):
            continue
        accuracy, several = list(100 * group.val_accuracy), len(group) > 1
        mean, deviation = mean_sd(accuracy)
        found = paired_difference(accuracy, list(100 * first.val_accuracy))
        interval = f" [{found.low:+.2f}, {found.high:+.2f}]" if found.n > 2 else ""
        lines.append({
            "Trial": trial, "Validation (%)": f"{mean:.2f}" + (f" ± {deviation:.2f}" if several else ""),
            "Difference": "–" if group is first else f"{found.mean:+.2f}{interval}".replace("-", "−"),
            "NLL": f"{group.val_nll.mean():.3f}", "Train (%)": f"{100 * group.train_accuracy.mean():.1f}",
            "Views": group.views.iloc[0], "Epochs": group.epochs.iloc[0], "n": len(group),
        })  # fmt: skip
    return pd.DataFrame(lines)


def _runs_of(group: pd.DataFrame) -> pd.DataFrame:
    return group.drop(columns="trial").reset_index(drop=True)


def committed_sweeps(
    settings: Settings, dataset: Dataset, kinds: Collection[str], teachers: Sequence[Teacher] = ()
) -> list[tuple[Sweep, pd.DataFrame]]:
    """The sweeps in `report/sweeps/<profile>` of these kinds (`Sweep.what`), and their rows: of those alone that were
    made with these very images, and with the weights behind these teachers.
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


def is_map(sweep: Sweep) -> bool:
    """Whether its trials are combinations of temperature and alpha, as `figures.setting_map` draws them."""
    return any("temperature" in name and "alpha" in name for name in sweep.trials)
