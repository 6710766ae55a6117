"""Run sweeps: every trial over the same folds and seeds, scored on validation images alone."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kdutils.cache import check_writable, write_text
from kdutils.data.images import Dataset, load_data, rotate_validation
from kdutils.data.views import view_table
from kdutils.parallel import check_cluster, run_jobs
from kdutils.results.sweeps import METHOD, Sweep, check_sweep, combinations, labelled_checksum, read_rows
from kdutils.settings import Settings, TeacherSettings, UserError, apply_threads, checked, load_settings
from kdutils.students import fit_student, named_method
from kdutils.teachers import fine_tune, prepare_fine_tuning, soft_labels, try_fine_tuning

OF_THE_DATA = ("data", "train_size", "val_size", "split_seed")


class Trial(NamedTuple):
    """One combination of settings, ready to run. what: as in `Sweep`."""

    what: str
    settings: Settings
    teachers: list[TeacherSettings]
    rule: str


def grid_sweep(what: str, grid: Sequence[str], seeds: list[int], teacher: str) -> Sweep:
    """The sweep of one grid, given as `NAME=VALUE,VALUE,...` for each setting; its first combination is the baseline.

    Besides settings, a grid can name `seeds`, `teachers` (labels; of all kinds but `scratch`; default: `teacher`), and
    `rule`.
    Raises `UserError` naming what does not fit.
    """
    values: dict[str, Any] = {}
    for text in grid:
        name, _, listed = (part.strip() for part in text.partition("="))
        if not listed or name in values:
            raise UserError(f"--grid: {text!r} is not valid; write NAME=VALUE,VALUE,... and each name once")
        values[name] = [value.strip() for value in listed.split(",")]
    if "seeds" in values:
        seeds = checked("seeds", f"[{','.join(values.pop('seeds'))}]", "--grid seeds")
    fixed = {"teachers": teacher} if what != "scratch" and "teachers" not in values else {}
    trials = combinations(values, fixed, "--grid")
    name = "-".join([what, *values])
    return check_sweep(Sweep(name, name, what, [0], seeds, trials, next(iter(trials))), "--grid")


def run_sweep(
    sweep: Sweep, profile: str, parameters: Mapping[str, Any], out: Path, workers: int = 1, scheduler: str | None = None
) -> pd.DataFrame:
    """Try every trial on every fold and seed, and write the rows to `out` at the end; nothing is tried twice.

    `workers` and `scheduler`: as in `kdutils.parallel.run_jobs`. What trials share - features, soft labels - is made
    before the first one starts. Raises `UserError` for unfit settings before anything is trained.
    """
    if changed := {*OF_THE_DATA} & {name for values in sweep.trials.values() for name in values}:
        raise UserError(
            f"sweep: {sweep.name} changes {min(changed)}; all trials must see the same images; leave it out"
        )
    trials = {name: _trial(sweep.what, values, profile, parameters) for name, values in sweep.trials.items()}
    first = next(iter(trials.values())).settings
    apply_threads(first)
    check_writable(out.parent, "--out")
    if scheduler:
        check_cluster(scheduler)
    images = json.dumps(dataclasses.asdict(first))
    _prepare(sweep, list(trials.values()), _images(images))
    jobs, rows = {}, []
    job_of: dict[str, str] = {}  # by what is done
    for (name, trial), fold, seed in itertools.product(trials.items(), sweep.folds, sweep.seeds):
        job = f"{name}, fold {fold}, seed {seed}"
        teachers = [dataclasses.asdict(teacher) for teacher in trial.teachers]
        done = [trial.settings.identity(), teachers, trial.rule, fold, seed]
        done_by = job_of.setdefault(json.dumps(done), job)
        if done_by == job:
            jobs[job] = partial(_try, trial, images, fold, seed)
        rows.append((name, done_by))
    found = run_jobs(jobs, workers, scheduler, title="sweep")
    frame = pd.DataFrame([found[job] for _, job in rows])
    frame.insert(3, "trial", [name for name, _ in rows])
    write_text(out, frame.to_csv(index=False))
    return read_rows(out)


def _trial(what: str, values: Mapping[str, Any], profile: str, parameters: Mapping[str, Any]) -> Trial:
    changes = {name: value for name, value in values.items() if name not in METHOD}
    own = {name: value for name, value in changes.items() if name.startswith("teacher_") and name != "teacher_seeds"}
    settings = load_settings(profile, **{**parameters, **{name: changes[name] for name in changes.keys() - own}})
    labels = str(values["teachers"]).split("+") if "teachers" in values else []
    # what a trial says of a teacher stands above the teacher's record
    own = {name.removeprefix("teacher_"): checked(name, value) for name, value in own.items()}
    teachers = [dataclasses.replace(settings.teacher(label), **own) for label in labels]
    return Trial(what, settings, teachers, values.get("rule", "mean_prob"))


def _prepare(sweep: Sweep, trials: Sequence[Trial], dataset: Dataset) -> None:
    """Make what trials share."""
    if sweep.what == "teacher":
        for trial, fold in itertools.product(trials, sweep.folds):
            prepare_fine_tuning(trial.teachers[0], rotate_validation(dataset, fold), trial.settings, sweep.seeds)
        return
    for trial in trials:
        for teacher in trial.teachers:
            made = fine_tune(teacher, dataset, trial.settings)
            soft_labels(made, dataset.train.images, len(view_table(**trial.settings.views)))


@functools.lru_cache(maxsize=1)
def _images(settings: str) -> Dataset:
    """The data set of settings in JSON. It is kept, because all trials of a sweep see the same one."""
    return load_data(Settings(**json.loads(settings)))


def _try(trial: Trial, images: str, fold: int, seed: int) -> dict[str, Any]:
    """One row."""
    settings, dataset = trial.settings, rotate_validation(_images(images), fold)
    if trial.what == "teacher":
        found = try_fine_tuning(trial.teachers[0], dataset, settings, seed)
        what, weights, views = trial.teachers[0].label, found.facts["weights"], found.facts["trained_views"]
    else:
        teachers = [fine_tune(teacher, dataset, settings) for teacher in trial.teachers]
        method = named_method(trial.what, settings, teachers, trial.rule)
        found = fit_student(method, dataset, settings, seed)
        what, views = " ".join([method.name, *method.teacher_names]), len(view_table(**settings.views))
        weights = "+".join(teacher.checksum for teacher in teachers)
    row = {"what": what, "data": labelled_checksum(_images(images)), "weights": weights, "fold": fold, "seed": seed}
    last = {name: values[-1] for name, values in found.facts["history"].items()}
    row |= {"views": views, "epochs": len(found.facts["history"]["val_accuracy"])}
    row |= {"val_accuracy": f"{last['val_accuracy']:.6f}", "val_nll": f"{last['val_loss']:.6f}"}
    return {**row, "train_accuracy": f"{last['train_accuracy']:.6f}", "seconds": f"{found.seconds:.1f}"}
