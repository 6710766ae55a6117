"""Sweeps: settings tried out on validation images alone, every trial over the same folds and seeds."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kdutils.data import load_data, rotate_validation
from kdutils.metrics import mean_sd, paired_difference
from kdutils.runs import check_writable, write_text
from kdutils.settings import (
    ARCHITECTURES,
    ROOT,
    UserError,
    apply_threads,
    check_names,
    load_settings,
    read_yaml,
    shown_path,
)
from kdutils.teachers import try_fine_tuning

COLUMNS = (
    "what", "weights", "trial", "fold", "seed", "views", "epochs", "val_accuracy", "val_nll", "train_accuracy",
    "seconds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is tried: `trials` gives by name the settings that replace a profile's; all are compared with the first."""

    name: str
    title: str
    what: str
    folds: list[int]
    seeds: list[int]
    trials: dict[str, dict[str, Any]]
    baseline: str


def read_sweep(path: Path) -> Sweep:
    """A sweep from its YAML file: title, what (a ResNet), folds, seeds, `fixed` settings and `grids`.

    A grid maps settings to lists of values and stands for all their combinations; `{}` is the fixed settings alone.
    Raises `UserError` naming what does not fit.
    """
    content = read_yaml(path, "sweep")
    wanted = {"title": str, "what": str, "folds": list, "seeds": list, "grids": list}
    for name, kind in wanted.items():
        if not isinstance(content.get(name), kind) or not content[name]:
            raise UserError(f"sweep: {shown_path(path)} needs '{name}', a {'text' if kind is str else 'list'}")
    if odd := content.keys() - wanted.keys() - {"fixed"}:
        raise UserError(f"sweep: {shown_path(path)} has '{min(odd, key=str)}'; known are {', '.join(wanted)} and fixed")
    if content["what"] not in ARCHITECTURES:
        raise UserError(
            f"sweep: {shown_path(path)}: what is {content['what']!r}; it must be {' or '.join(ARCHITECTURES)}"
        )
    for name in ("folds", "seeds"):
        if not all(type(v) is int and v >= 0 for v in content[name]) or len(set(content[name])) < len(content[name]):
            raise UserError(f"sweep: {shown_path(path)}: {name} must be different whole numbers, 0 or above")
    fixed = content.get("fixed") or {}
    if not all(isinstance(part, dict) for part in (fixed, *content["grids"])) or content["grids"][0] != {}:
        raise UserError(
            f"sweep: {shown_path(path)}: fixed and grids hold 'setting: values'; the first grid is {{}}, the baseline"
        )
    trials = {}
    for grid in content["grids"]:
        check_names([*fixed, *grid], where=f"sweep {path.stem}")
        values = [value if isinstance(value, list) else [value] for value in grid.values()]
        if not all(values) or "profile" in {*fixed, *grid}:
            raise UserError(
                f"sweep: {shown_path(path)}: give every setting a value, and the profile with --profile"
            )
        for combination in itertools.product(*values):
            changes = dict(zip(grid, combination, strict=True))
            trials[", ".join(f"{name} = {value}" for name, value in changes.items()) or "baseline"] = fixed | changes
    baseline = ", ".join(f"{name} = {value}" for name, value in fixed.items()) or "the profile's settings"
    return Sweep(path.stem, content["title"], content["what"], content["folds"], content["seeds"], trials, baseline)


def run_sweep(sweep: Sweep, profile: str, parameters: Mapping[str, Any], out: Path) -> pd.DataFrame:
    """Try every trial on every fold and seed, and write the rows to `out` at the end; nothing is tried twice.

    Raises `UserError` for unfit settings before anything is trained.
    """
    if any(trial.keys() & {"data", "train_size", "val_size", "split_seed"} for trial in sweep.trials.values()):
        raise UserError(f"sweep: {sweep.name} changes the data; every trial must see the same images")
    settings = {name: load_settings(profile, **{**parameters, **trial}) for name, trial in sweep.trials.items()}
    first = next(iter(settings.values()))
    apply_threads(first)
    dataset = load_data(first)
    folds = {fold: rotate_validation(dataset, fold) for fold in sweep.folds}
    check_writable(out.parent, "--out")
    rows = []
    for trial, used in settings.items():
        for fold, seed in itertools.product(sweep.folds, sweep.seeds):
            found = try_fine_tuning(sweep.what, folds[fold], used, seed)
            history = found.facts["history"]
            rows.append({
                "what": sweep.what, "weights": found.facts["weights"], "trial": trial, "fold": fold, "seed": seed,
                "views": found.facts["trained_views"], "epochs": len(history["val_accuracy"]),
                "val_accuracy": f"{history['val_accuracy'][-1]:.6f}", "val_nll": f"{history['val_loss'][-1]:.6f}",
                "train_accuracy": f"{history['train_accuracy'][-1]:.6f}", "seconds": f"{found.seconds:.1f}",
            })  # fmt: skip
    write_text(out, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))
    return read_rows(out)


def read_rows(path: Path) -> pd.DataFrame:
    """The rows that a sweep wrote."""
    return pd.read_csv(path, dtype={"weights": str})


def settings_of_trials(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column for every numeric setting that a trial's name gives (nan where it gives none)."""
    given = frame.trial.str.extractall(r"(?:^|, )(?P<name>\w+) = (?P<value>[-+.\de]+)(?=, |$)").reset_index(level=0)
    given = given.set_axis(["row", "name", "value"], axis=1).assign(value=lambda found: found.value.astype(float))
    return frame.join(given.pivot(index="row", columns="name", values="value"))


def sweep_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a trial: validation accuracy (mean ± sd over folds and seeds) and the paired difference to the first."""
    lines = []
    groups = {trial: group for trial, group in frame.groupby("trial", sort=False)}
    first = next(iter(groups.values()))
    for trial, group in groups.items():
        accuracy, several = list(100 * group.val_accuracy), len(group) > 1
        mean, deviation = mean_sd(accuracy)
        found = paired_difference(accuracy, list(100 * first.val_accuracy))
        interval = f" [{found.low:+.2f}, {found.high:+.2f}]" if several else ""
        lines.append({
            "Trial": trial, "Validation (%)": f"{mean:.2f}" + (f" ± {deviation:.2f}" if several else ""),
            "Difference": "–" if group is first else f"{found.mean:+.2f}{interval}".replace("-", "−"),
            "NLL": f"{group.val_nll.mean():.3f}", "Train (%)": f"{100 * group.train_accuracy.mean():.1f}",
            "Views": group.views.iloc[0], "Epochs": group.epochs.iloc[0], "n": len(group),
        })  # fmt: skip
    return pd.DataFrame(lines)


def selection_tables(profile: str, weights: Collection[str]) -> list[tuple[str, str, pd.DataFrame]]:
    """Name, caption and table of every sweep in `report/sweeps/<profile>` that was made with these weights, which are
    named by their checksums."""
    found = []
    for path in sorted((ROOT / "report" / "sweeps" / Path(profile).stem).glob("*.yaml")):
        if not path.with_suffix(".csv").is_file():
            continue
        rows = read_rows(path.with_suffix(".csv"))
        if set(rows.weights) <= set(weights):
            sweep = read_sweep(path)
            caption = (
                f"{sweep.title}: accuracy on validation images, mean ± standard deviation over {len(sweep.folds)} "
                f"folds of the labelled images and {len(sweep.seeds)} seed(s); paired difference to the baseline in "
                f"points, with its 95 % confidence interval (a guide: the folds share training images). "
                f"Baseline: {sweep.baseline}."
            )
            found.append((sweep.name, caption, sweep_table(rows)))
    return found
