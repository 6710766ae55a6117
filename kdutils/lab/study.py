"""The full study: the arms beyond the four notebooks' own - controls, budgets, other losses, unlabelled images.

Each arm is a function of a `Study` and can be trained alone, so that they can be spread over processes.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kdutils.cache import cached
from kdutils.compat import ensure_torchvision
from kdutils.data.images import Dataset, left_over, load_data
from kdutils.data.views import Pool, pool_of_draws, pool_of_views
from kdutils.losses import cross_entropy, distillation_loss
from kdutils.parallel import run_jobs
from kdutils.progress import progress_lines
from kdutils.results.metrics import accuracy
from kdutils.results.tables import WORDS, student_rows
from kdutils.settings import Settings, UserError, apply_threads, load_settings
from kdutils.students import LOSSES, Method, StudentRun, as_teacher, named_method, train_students
from kdutils.teachers import Teacher, fine_tune, out_of_fold, shuffled_within_classes, teach

LONG = 100  # epochs of the long budget
EARLIER_RECIPE: dict[str, Any] = {
    "epochs": 30, "batch_size": 64, "optimizer": "adam", "schedule": "constant", "learning_rate": 0.001,
    "weight_decay": 0.0, "label_smoothing": 0.0,
}  # fmt: skip
EARLIER_TEMPERATURE, EARLIER_ALPHA = 4.0, 0.8
EARLIER_AREA, EARLIER_ROTATION = (0.8, 1.0), 30
EARLIER_RANDAUGMENT = {"num_ops": 2, "magnitude": 7}
DRAWS = 15  # random draws of the earlier submission's augmentation that are kept of every image
# the best of twelve trials each on validation images (report/sweeps/cifar10-standin)
TUNED: dict[str, dict[str, Any]] = {  # the loss of Hinton et al., by teacher
    "resnet50": {"temperature": 2.0, "alpha": 0.25},
    "resnet18": {"temperature": 8.0, "alpha": 0.25},
}
OTHER_LOSSES: dict[str, dict[str, Any]] = {
    "dkd": {"temperature": 2.0, "alpha": 0.25},
    "dist": {"temperature": 4.0, "alpha": 0.75},
    "kd_standardized": {"temperature": 2.0, "alpha": 0.5},
}
UNLABELLED_VIEWS = {"max_shift": 0, "shift_step": 1}  # an image and its mirror image


class Entry(NamedTuple):
    """One arm of the study: the task it belongs to, its name in words, with its own settings and, where it has one,
    its own pool."""

    task: str
    words: str
    arm: Method
    settings: Settings
    pool: Pool | None = None

    def rows(self, runs: Sequence[StudentRun], dataset: Dataset, teachers: Sequence[Teacher] = ()) -> list[dict]:
        """Tidy rows of its students, with the number of labels they had."""
        labels = self.settings.train_size if self.pool is None else int((self.pool.labels >= 0).sum())
        rows = student_rows(self.task, runs, dataset, self.settings, teachers)
        return [row | {"labels": labels} for row in rows]


class Study:
    """What the arms share, made or loaded when first asked for."""

    def __init__(self, settings: Settings):
        self.settings = settings

    @cached_property
    def dataset(self) -> Dataset:
        return load_data(self.settings)

    @cached_property
    def teachers(self) -> tuple[Teacher, ...]:
        return tuple(fine_tune(arch, self.dataset, self.settings) for arch in ("resnet50", "resnet18"))

    @cached_property
    def teacher(self) -> Teacher:
        """The one that does better on the validation images, over its seeds: the study's arms learn from it."""

        def on_validation(teacher: Teacher) -> float:
            return sum(accuracy(run.logits["val"], self.dataset.val.labels) for run in teacher.runs) / len(teacher.runs)

        return max(self.teachers, key=on_validation)

    @property
    def other_teacher(self) -> Teacher:
        return next(teacher for teacher in self.teachers if teacher is not self.teacher)

    @property
    def scratch(self) -> Method:
        return named_method("scratch", self.settings)

    @cached_property
    def students_as_teacher(self) -> Teacher:
        return as_teacher(train_students(self.scratch, self.dataset, self.settings), self.dataset, self.settings)

    @property
    def distil(self) -> Callable[..., Tensor]:
        return LOSSES["kd"](self.settings)

    @cached_property
    def earlier(self) -> Pool:
        """The training images under the earlier submission's augmentation."""
        train = self.dataset.train
        key = {"what": "draws", "images": self.dataset.part_checksums["train"], "draws": DRAWS}
        made = cached(
            self.settings.run_folder / "draws", "earlier-augmentation", key,
            lambda: ({"draws": earlier_augmentation(train.images.cpu(), DRAWS, seed=0)}, {}),
        )  # fmt: skip
        return pool_of_draws("earlier-augmentation", made.tensors["draws"].to(train.images.device), train.labels)

    @property
    def earlier_settings(self) -> Settings:
        return dataclasses.replace(self.settings, **EARLIER_RECIPE)

    def with_rest(self, labelled: bool) -> Pool:
        """The training images and all that are left over, the latter with or without their labels."""
        train, rest = self.dataset.train, left_over(self.settings)
        labels = torch.cat([train.labels, rest.labels if labelled else torch.full_like(rest.labels, -1)])
        name, views = ("all-labels", self.settings.views) if labelled else ("unlabelled", UNLABELLED_VIEWS)
        return pool_of_views(name, torch.cat([train.images, rest.images]), labels, **views)

    def for_steps_of(self, epochs: int, pool: Pool) -> Settings:
        """Settings whose epochs over a pool take about as many steps as `epochs` over the training images."""
        steps = epochs * (len(self.dataset.train.labels) // self.settings.batch_size)
        return dataclasses.replace(
            self.settings, epochs=max(1, round(steps / (len(pool.labels) // self.settings.batch_size)))
        )

    @property
    def long(self) -> Settings:
        return dataclasses.replace(self.settings, epochs=LONG)

    def parts(self) -> list[tuple[Teacher, Settings]]:
        """Each ResNet with its last layer trained, and with its last block and last layer, and the settings for it.

        All on the same two views, an image and its mirror image, each part by the recipe of the ResNet whose part it
        is in the settings. They teach nobody.
        """
        archs = [teacher.arch for teacher in self.teachers]
        pairs = [(arch, self.settings_of_part(arch, like)) for arch in archs for like in archs]
        return [(fine_tune(arch, self.dataset, settings), settings) for arch, settings in pairs]

    def settings_of_part(self, arch: str, like: str) -> Settings:
        """Settings by which a ResNet has the part trained, and in the way, that the ResNet `like` has."""
        names = ("trainable", "epochs", "learning_rate", "weight_decay", "last_layer_factor", "standardize")
        changes = {f"{arch}_{name}": self.settings.of_teacher(like, name) for name in names}
        return dataclasses.replace(self.settings, max_shift=0, shift_step=1, **changes)

    def train(self, entry: Entry, seeds: Sequence[int] | None = None) -> list[StudentRun]:
        """The trained students of an arm; of some seeds only, if asked."""
        settings = dataclasses.replace(entry.settings, seeds=list(seeds or entry.settings.seeds))
        return train_students(entry.arm, self.dataset, settings, entry.pool)


def earlier_augmentation(images: Tensor, draws: int, seed: int) -> Tensor:
    """Random draws uint8 [N, V, H, W, 3] of images uint8 [N, 3, H, W], as the earlier submission augmented them:
    random resized crop, flip, rotation, RandAugment (Cubuk et al. 2020, arXiv:1909.13719), by the constants above. The
    global random state is left alone.
    """
    transforms = ensure_torchvision().transforms
    augment = transforms.Compose([
        transforms.RandomResizedCrop(images.shape[-1], scale=EARLIER_AREA, antialias=True),
        transforms.RandomHorizontalFlip(), transforms.RandomRotation(EARLIER_ROTATION),
        transforms.RandAugment(**EARLIER_RANDAUGMENT),
    ])  # fmt: skip
    out = torch.empty(len(images), draws, *images.shape[2:], 3, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index in progress_lines(range(len(images)), "the earlier augmentation"):
            for view in range(draws):
                out[index, view] = augment(images[index]).permute(1, 2, 0)
    return out


def _no_label_smoothing(study: Study) -> Entry:
    return Entry("1", "No label smoothing", Method("no_label_smoothing", cross_entropy), study.settings)


def _scratch_long(study: Study) -> Entry:
    return Entry("1", "From scratch", study.scratch, study.long)


def _scratch_earlier_recipe(study: Study) -> Entry:
    arm = Method("scratch_earlier_recipe", cross_entropy)
    return Entry("1", "The earlier recipe", arm, study.earlier_settings, study.earlier)


def _earlier_recipe_longer(study: Study) -> Entry:
    """The earlier recipe, and the same number of epochs of it again."""
    start = study.train(_scratch_earlier_recipe(study))
    arm = Method("earlier_recipe_longer", cross_entropy, start=start)
    return Entry("3", "The earlier recipe, as long again", arm, study.earlier_settings, study.earlier)


def _kd_warm_start(study: Study) -> Entry:
    """The earlier recipe, and the same number of epochs again, now distilling."""
    start = study.train(_scratch_earlier_recipe(study))
    teacher = teach(study.teacher, study.earlier, study.dataset, study.settings)
    loss = partial(distillation_loss, temperature=EARLIER_TEMPERATURE, alpha=EARLIER_ALPHA)
    arm = Method("kd_warm_start", loss, (teacher,), start=start)
    return Entry("3", "The earlier recipe, then distilled", arm, study.earlier_settings, study.earlier)


def _kd_long(study: Study, other: bool = False) -> Entry:
    teacher = study.other_teacher if other else study.teacher
    return Entry("3", f"Distilled from {name_of(teacher)}", Method("kd", study.distil, (teacher,)), study.long)


def _two_long(study: Study) -> Entry:
    return Entry("4", "Distilled from both", named_method("kd", study.settings, study.teachers), study.long)


def _kd_shuffled(study: Study) -> Entry:
    shuffled = shuffled_within_classes(study.teacher, study.dataset.train.labels)
    return Entry("3", "Shuffled soft labels", Method("kd_shuffled", study.distil, (shuffled,)), study.settings)


def _kd_out_of_fold(study: Study) -> Entry:
    teacher = out_of_fold(study.teacher, study.dataset, study.settings)
    return Entry("3", "Held-out soft labels", Method("kd_out_of_fold", study.distil, (teacher,)), study.settings)


def _kd_self(study: Study) -> Entry:
    arm = Method("kd_self", study.distil, (study.students_as_teacher,))
    return Entry("3", "Distilled from another student", arm, study.settings)


def _kd_tuned(study: Study, other: bool = False) -> Entry:
    """With the temperature and weight that did best with this very teacher."""
    teacher = study.other_teacher if other else study.teacher
    loss = LOSSES["kd"](dataclasses.replace(study.settings, **TUNED[teacher.arch]))
    words = f"Distilled from {name_of(teacher)}, tuned for it"
    return Entry("3", words, Method("kd_tuned", loss, (teacher,)), study.settings)


def _other_loss(study: Study, name: str, words: str) -> Entry:
    settings = dataclasses.replace(study.settings, **OTHER_LOSSES[name])
    return Entry("3", words, named_method(name, settings, [study.teacher]), study.settings)


def _scratch_equal_steps(study: Study) -> Entry:
    """The student of the long budget again, as what the two below are held against."""
    return _scratch_long(study)._replace(task="extra")


def _kd_equal_steps(study: Study) -> Entry:
    return _kd_long(study)._replace(task="extra")


def _kd_unlabelled(study: Study) -> Entry:
    """The labelled images and the others without labels, for as many steps as the long budget."""
    pool = study.with_rest(labelled=False)
    teacher = teach(study.teacher, pool, study.dataset, study.settings)
    arm = Method("kd_unlabelled", study.distil, (teacher,))
    return Entry("extra", "Distilled, with unlabelled images", arm, study.for_steps_of(LONG, pool), pool)


def _scratch_all_labels(study: Study) -> Entry:
    """What the labels of those images would be worth."""
    pool = study.with_rest(labelled=True)
    arm = dataclasses.replace(study.scratch, name="scratch_all_labels")
    return Entry("extra", "From scratch, all labels", arm, study.for_steps_of(LONG, pool), pool)


ENTRIES: dict[str, Callable[[Study], Entry]] = {
    "no_label_smoothing": _no_label_smoothing,
    "scratch_long": _scratch_long,
    "scratch_earlier_recipe": _scratch_earlier_recipe,
    "earlier_recipe_longer": _earlier_recipe_longer,
    "kd_warm_start": _kd_warm_start,
    "kd_long": _kd_long,
    "kd_long_other": partial(_kd_long, other=True),
    "two_long": _two_long,
    "kd_shuffled": _kd_shuffled,
    "kd_out_of_fold": _kd_out_of_fold,
    "kd_self": _kd_self,
    "kd_tuned": _kd_tuned,
    "kd_tuned_other": partial(_kd_tuned, other=True),
    "dkd": partial(_other_loss, name="dkd", words="DKD"),
    "dist": partial(_other_loss, name="dist", words="DIST"),
    "kd_standardized": partial(_other_loss, name="kd_standardized", words="Standardised logits"),
    "scratch_equal_steps": _scratch_equal_steps,
    "kd_equal_steps": _kd_equal_steps,
    "kd_unlabelled": _kd_unlabelled,
    "scratch_all_labels": _scratch_all_labels,
}

GROUPS = {
    "freeze": (),  # ResNets alone: `Study.parts`
    "controls": ("no_label_smoothing", "kd_shuffled"),
    "memory": ("kd_out_of_fold",),
    "self": ("kd_self",),
    "losses": ("kd_tuned", "kd_tuned_other", "dkd", "dist", "kd_standardized"),
    "earlier": ("scratch_earlier_recipe", "earlier_recipe_longer", "kd_warm_start"),
    "budget": ("scratch_long", "kd_long", "kd_long_other", "two_long"),
    "unlabelled": ("scratch_equal_steps", "kd_equal_steps", "kd_unlabelled", "scratch_all_labels"),
}


def tuned_words() -> str:
    """With which temperature and weight (and constants of its own) each loss of the group `losses` is used."""
    texts = {f"with {WORDS[arch]}": values for arch, values in TUNED.items()}
    for name, values in OTHER_LOSSES.items():
        constants = cast(partial, LOSSES[name](load_settings("cifar10"))).keywords
        greek = {"alpha": "α", "beta": "β", "gamma": "γ"}
        own = ", ".join(
            f"{greek[key.removeprefix(f'{name}_')]} = {value:g}"
            for key, value in constants.items() if key.startswith(f"{name}_")
        )  # fmt: skip
        words = {"dkd": "DKD", "dist": "DIST", "kd_standardized": "standardised logits"}[name]
        texts[f"{words} (its own {own})" if own else words] = values
    return "; ".join(f"{of} T = {values['temperature']:g}, α = {values['alpha']:g}" for of, values in texts.items())


def earlier_words() -> str:
    """The earlier submission's recipe and augmentation."""
    recipe, (least, most) = EARLIER_RECIPE, (100 * share for share in EARLIER_AREA)
    return (
        f"{WORDS[recipe['optimizer']]} with a {recipe['schedule']} learning rate of {recipe['learning_rate']:g}, "
        f"weight decay {recipe['weight_decay']:g}, batches of {recipe['batch_size']}, label smoothing "
        f"{recipe['label_smoothing']:g}, {recipe['epochs']} epochs; in distillation T = {EARLIER_TEMPERATURE:g}, "
        f"α = {EARLIER_ALPHA:g}; {DRAWS} stored draws of every image, each a random crop of {least:g} to {most:g} % of "
        f"the area, flipped or not, rotated by up to {EARLIER_ROTATION} degrees and changed by RandAugment "
        f"({EARLIER_RANDAUGMENT['num_ops']} operations of magnitude {EARLIER_RANDAUGMENT['magnitude']})"
    )


@lru_cache(maxsize=1)
def _study(profile: str, parameters: str) -> Study:
    settings = load_settings(profile, **json.loads(parameters))
    apply_threads(settings)
    return Study(settings)


def name_of(teacher: Teacher) -> str:
    """What a teacher's architecture is called: ResNet-18."""
    return WORDS[teacher.arch]


def check_groups(groups: Sequence[str]) -> None:
    """Raise `UserError` for a group that the study does not have, naming those it has."""
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise UserError(f"study: there is no group {unknown[0]!r:.80}; use {', '.join(GROUPS)}, or [] for none")


def entries_of(groups: Sequence[str]) -> list[str]:
    """The names of all arms of some groups, in the study's order."""
    return [name for group, names in GROUPS.items() if group in groups for name in names]


def train_entry(profile: str, parameters: str, name: str, seed: int) -> None:
    """Train one arm's student of one seed: a job for a process of its own. `parameters`: as JSON."""
    study = _study(profile, parameters)
    study.train(ENTRIES[name](study), [seed])


def run_study(profile: str, parameters: Mapping[str, Any], workers: int = 1, scheduler: str | None = None) -> Settings:
    """Train all arms of the settings' groups, spread over processes or a cluster (`jobs.run_jobs`); what is trained
    already is found. The notebook `study` then shows them.

    Raises `UserError` when there is no group, and for jobs that failed twice.
    """
    as_json = json.dumps(dict(parameters))
    study = _study(profile, as_json)
    groups = study.settings.study
    if not groups:
        raise UserError(f"study: no group is named; give -p study '[\"controls\"]', of {', '.join(GROUPS)}")
    # what several jobs need is made here once
    _ = study.teachers
    if "freeze" in groups:
        study.parts()
    if "memory" in groups:
        out_of_fold(study.teacher, study.dataset, study.settings)
    if "self" in groups:
        _ = study.students_as_teacher
    if "earlier" in groups:
        teach(study.teacher, study.earlier, study.dataset, study.settings)
    if "unlabelled" in groups:
        teach(study.teacher, study.with_rest(labelled=False), study.dataset, study.settings)
    run_jobs(
        {
            f"{name}, seed {seed}": partial(train_entry, profile, as_json, name, seed)
            for name in entries_of(groups) for seed in study.settings.seeds
        },
        workers, scheduler, title="students of the study",
    )  # fmt: skip
    return study.settings
