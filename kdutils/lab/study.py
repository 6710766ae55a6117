"""The study: methods beyond those of the four notebooks. Controls, other losses, longer training, other teachers.

`GROUPS` lists them. Each is a function of a `Study` and can be trained alone, so that processes can share the work.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, cast

from kdutils.data.images import Dataset, load_data
from kdutils.data.views import view_table
from kdutils.losses import class_mean, cross_entropy
from kdutils.parallel import run_jobs
from kdutils.results.record import student_rows
from kdutils.results.tables import teacher_words
from kdutils.settings import Settings, UserError, apply_threads, load_settings
from kdutils.students import LOSSES, Method, StudentRun, named_method, train_students
from kdutils.teachers import Teacher, better_teacher, fine_tune, soft_labels

LONG = 100  # epochs of the group `epochs`


class Entry(NamedTuple):
    """A method of the study: the task it belongs to, its name in words, and its own settings."""

    task: str
    words: str
    method: Method
    settings: Settings

    def rows(self, runs: Sequence[StudentRun], dataset: Dataset, teachers: Sequence[Teacher] = ()) -> list[dict]:
        """Rows of results.csv of its students."""
        return student_rows(self.task, runs, dataset, self.settings, teachers)


class Study:
    """What the methods share, made or loaded when first needed. Raises `UserError` as `check_groups` does."""

    def __init__(self, settings: Settings):
        check_groups(settings)
        self.settings = settings

    @cached_property
    def dataset(self) -> Dataset:
        return load_data(self.settings)

    @cached_property
    def teachers(self) -> tuple[Teacher, ...]:
        return tuple(fine_tune(teacher, self.dataset, self.settings) for teacher in self.settings.teachers)

    @cached_property
    def backbones(self) -> tuple[Teacher, ...]:
        """The teachers of the group `backbones`; none where it is not asked for."""
        asked = self.settings.backbones if "backbones" in self.settings.study else ()
        return tuple(fine_tune(teacher, self.dataset, self.settings) for teacher in asked)

    @cached_property
    def teacher(self) -> Teacher:
        """The better one on validation images: the methods with one teacher learn from it."""
        return better_teacher(self.teachers)

    @property
    def other_teacher(self) -> Teacher:
        return next(teacher for teacher in self.teachers if teacher is not self.teacher)

    @property
    def long(self) -> Settings:
        """Settings for `LONG` epochs."""
        return dataclasses.replace(self.settings, epochs=LONG)

    def train(self, entry: Entry, seeds: Sequence[int] | None = None) -> list[StudentRun]:
        """The trained students of a method; if asked, of some seeds only."""
        settings = dataclasses.replace(entry.settings, seeds=list(seeds or entry.settings.seeds))
        return train_students(entry.method, self.dataset, settings)

    def prepare(self) -> None:
        """Make what several students need: the teachers, and their soft labels of every image and view."""
        for teacher in (*self.teachers, *self.backbones):
            soft_labels(teacher, self.dataset.train.images, len(view_table(**self.settings.views)))


def _no_label_smoothing(study: Study) -> Entry:
    return Entry("1", "No label smoothing", Method("no_label_smoothing", cross_entropy), study.settings)


def _class_mean(study: Study) -> Entry:
    """Class similarities alone: every image of a class gets the same soft labels."""
    combine = partial(class_mean, temperature=study.settings.temperature)
    method = Method("kd_class_mean", LOSSES["kd"](study.settings), (study.teacher,), combine)
    return Entry("3", "Soft labels averaged over each class", method, study.settings)


def _other_loss(study: Study, name: str, words: str) -> Entry:
    return Entry("3", words, named_method(name, study.settings, [study.teacher]), study.settings)


def _scratch_long(study: Study) -> Entry:
    return Entry("1", "From scratch", named_method("scratch", study.settings), study.long)


def _kd_long(study: Study, which: str = "teacher") -> Entry:
    teacher: Teacher = getattr(study, which)
    method = named_method("kd", study.settings, [teacher])
    return Entry("3", f"Distilled from {teacher_words(teacher.label)}", method, study.long)


def _two_long(study: Study) -> Entry:
    return Entry("4", "Distilled from both", named_method("kd", study.settings, study.teachers), study.long)


def _backbone(study: Study, label: str) -> Entry:
    teacher = next(teacher for teacher in study.backbones if teacher.label == label)
    words = f"Distilled from {teacher_words(label)}"
    return Entry("3", words, named_method("kd", study.settings, [teacher]), study.settings)


GROUPS: dict[str, dict[str, Callable[[Study], Entry]]] = {
    "controls": {"no_label_smoothing": _no_label_smoothing, "kd_class_mean": _class_mean},
    "losses": {
        "dkd": partial(_other_loss, name="dkd", words="DKD"),
        "dist": partial(_other_loss, name="dist", words="DIST"),
        "kd_standardized": partial(_other_loss, name="kd_standardized", words="Standardised logits"),
    },
    "epochs": {
        "scratch_long": _scratch_long,
        "kd_long": _kd_long,
        "kd_long_other": partial(_kd_long, which="other_teacher"),
        "two_long": _two_long,
    },
    "backbones": {},  # one for each of the settings' `backbones`
}


def check_groups(settings: Settings) -> None:
    """Raise `UserError` for a group that `GROUPS` does not have, and for `backbones` where the settings name none."""
    if unknown := [group for group in settings.study if group not in GROUPS]:
        raise UserError(f"study: {unknown[0]!r} is not a group; use any of {', '.join(GROUPS)}")
    if "backbones" in settings.study and not settings.backbones:
        raise UserError("study: the group backbones needs teachers; name some in the setting backbones, as in teachers")


def entries_of(settings: Settings) -> dict[str, Callable[[Study], Entry]]:
    """What makes the entries of the settings' groups, by name, in the order of `GROUPS`."""
    backbones = {f"kd {teacher.label}": partial(_backbone, label=teacher.label) for teacher in settings.backbones}
    groups = GROUPS | {"backbones": backbones}
    return {name: make for group in groups if group in settings.study for name, make in groups[group].items()}


def loss_constants(settings: Settings) -> dict[str, dict[str, float]]:
    """Temperature, weight and own constants of each loss in the group `losses`: facts for the provenance."""
    bound = {name: cast(partial, LOSSES[name](settings)).keywords for name in GROUPS["losses"]}
    return {
        name: {constant: value for constant, value in values.items() if constant != "label_smoothing"}
        for name, values in bound.items()
    }


@lru_cache(maxsize=1)
def _study(profile: str, parameters: str) -> Study:
    settings = load_settings(profile, **json.loads(parameters))
    apply_threads(settings)
    return Study(settings)


def train_entry(profile: str, parameters: str, name: str, seed: int) -> None:
    """Train the student of one entry and seed: a job for a process of its own. parameters: JSON."""
    study = _study(profile, parameters)
    study.train(entries_of(study.settings)[name](study), [seed])


def run_study(profile: str, parameters: Mapping[str, Any], workers: int = 1, scheduler: str | None = None) -> Settings:
    """Train all students of the settings' groups, spread over processes or a cluster (`parallel.run_jobs`); those
    trained before are found. The notebook `study` then shows them.

    Raises `UserError` where no group is named, and for jobs that failed twice.
    """
    as_json = json.dumps(dict(parameters))
    study = _study(profile, as_json)
    if not study.settings.study:
        raise UserError(f"study: no group is named; give -p study '[\"controls\"]', or others of {', '.join(GROUPS)}")
    study.prepare()
    pairs = [(name, seed) for name in entries_of(study.settings) for seed in study.settings.seeds]
    jobs = {f"{name}, seed {seed}": partial(train_entry, profile, as_json, name, seed) for name, seed in pairs}
    run_jobs(jobs, workers, scheduler, title="students of the study")
    return study.settings
