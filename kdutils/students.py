"""Students: an arm is a loss and its teachers; every arm is trained by the same `fit`, from paired seeds."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdutils.cache import Cached, Checkpoint, cached, describe, lower_if_out_of_memory, resumable, source_of
from kdutils.data.images import Dataset
from kdutils.data.views import Pool, make_views, view_pixels
from kdutils.losses import (
    combine_teachers,
    cross_entropy,
    dist_distillation_loss,
    distillation_loss,
    dkd_distillation_loss,
    standardised_distillation_loss,
)
from kdutils.models import SmallCNN, normalise, seeded
from kdutils.settings import Settings, UserError
from kdutils.teachers import Teacher, TeacherRun
from kdutils.training import History, Recipe, fit, memory_format, predict


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train the student.

    loss: `loss(student_logits, labels)` without teachers, `loss(student_logits, teacher_logits, labels)` with;
    bind its parameters with `functools.partial`. combine: for two or more teachers, makes one target of a list of
    their logits: `combine(list_of_logits, labels=labels)`. start: trained students, one a seed, to go on from (with a
    fresh optimizer) instead of random weights.
    """

    name: str
    loss: Callable[..., Tensor]
    teachers: tuple[Teacher, ...] = ()
    combine: Callable[..., Tensor] | None = None
    start: Sequence["StudentRun"] = ()

    def __post_init__(self) -> None:
        if (len(self.teachers) > 1) != (self.combine is not None):
            raise UserError(f"arm {self.name}: give `combine` with two or more teachers, and only then")
        wanted = ("student_logits", "teacher_logits", "labels") if self.teachers else ("student_logits", "labels")
        try:
            inspect.signature(self.loss).bind(*wanted)
        except TypeError as error:
            raise UserError(
                f"arm {self.name}: the loss must be callable as loss({', '.join(wanted)}) ({error}); bind its other "
                "parameters by name with functools.partial"
            ) from error

    @property
    def teacher_names(self) -> tuple[str, ...]:
        return tuple(teacher.arch for teacher in self.teachers)


@dataclasses.dataclass(frozen=True)
class StudentRun:
    """One trained student: logits float32 [N, C] of `train`, `val` and `test` (view 0)."""

    arm: str
    teachers: tuple[str, ...]
    seed: int
    history: History
    logits: dict[str, Tensor]
    state: dict[str, Tensor]
    seconds: float
    fingerprint: str

    def network(self) -> SmallCNN:
        """The trained student."""
        return student_network(self.state)


def _distilling(loss: Callable[..., Tensor], **constants: float) -> Callable[[Settings], Callable[..., Tensor]]:
    """A loss with its constants; temperature, weight of the soft labels and label smoothing are the settings'."""
    return lambda settings: functools.partial(
        loss, temperature=settings.temperature, alpha=settings.alpha, label_smoothing=settings.kd_label_smoothing,
        **constants,
    )  # fmt: skip


LOSSES: dict[str, Callable[[Settings], Callable[..., Tensor]]] = {  # of the arms that are known by name
    "scratch": lambda settings: functools.partial(cross_entropy, label_smoothing=settings.label_smoothing),
    "kd": _distilling(distillation_loss),
    "dkd": _distilling(dkd_distillation_loss, dkd_alpha=1.0, dkd_beta=2.0),
    "dist": _distilling(dist_distillation_loss, dist_beta=2.0, dist_gamma=2.0),
    "kd_standardized": _distilling(standardised_distillation_loss),
}


def named_method(name: str, settings: Settings, teachers: Sequence[Teacher] = (), rule: str = "mean_prob") -> Method:
    """The arm of a name in `LOSSES`, as the notebooks have it; two teachers are combined by the rule."""
    loss = LOSSES[name](settings)
    if len(teachers) < 2:
        return Method(name, loss, tuple(teachers))
    combine = functools.partial(combine_teachers, rule=rule, temperature=settings.temperature)
    return Method(f"{name}_{rule}", loss, tuple(teachers), combine)


def student_recipe(settings: Settings) -> Recipe:
    """How the settings want every student trained."""
    return Recipe(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=settings.optimizer,
        schedule=settings.schedule,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )


def train_students(arm: Method, dataset: Dataset, settings: Settings, pool: Pool | None = None) -> list[StudentRun]:
    """Train the student once per seed of the settings, or load what was trained under the same conditions.

    One seed fixes the initial weights, the order of the images and their views, in every arm alike. With a `pool` it is
    trained on that in place of the data set's training images; the teachers' `view_logits` must be for it, too
    (`teachers.teach`).
    """
    return [_train_student(arm, dataset, settings, seed, pool) for seed in settings.seeds]


def _file_name(arm: Method, seed: int) -> str:
    return "-".join([arm.name, *arm.teacher_names, f"seed{seed}"])


def _called(arm: Method, seed: int) -> str:
    return f"{' '.join((arm.name, *arm.teacher_names))}, seed {seed}"


def fit_student(arm: Method, dataset: Dataset, settings: Settings, seed: int, pool: Pool | None = None) -> Cached:
    """One seed's student, or the one that was trained under the same conditions: its state, and its `history`.

    Test images are not looked at.
    """
    recipe = student_recipe(settings)
    key = {
        "what": "student", "network": source_of(SmallCNN), "loss": describe(arm.loss),
        "combine": describe(arm.combine) if arm.combine else None,
        "teachers": [teacher.run_for(seed).fingerprint for teacher in arm.teachers],
        "data": [dataset.part_checksums[part] for part in ("train", "val")], "views": settings.views,
        "recipe": dataclasses.asdict(recipe), "seed": seed,
        "precision": settings.precision,
    }  # fmt: skip
    if pool is not None:
        key |= {"data": [pool.fingerprint, dataset.part_checksums["val"]], "views": pool.name}
    start = {run.seed: run for run in arm.start}
    if start:
        if seed not in start:
            raise UserError(f"arm {arm.name}: there is no student of seed {seed} to start from; train one first")
        key["start"] = start[seed].fingerprint
    called = _called(arm, seed)

    def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict]:
        model = seeded(seed, SmallCNN, len(dataset.classes))
        if start:
            model.load_state_dict(start[seed].state)
        with lower_if_out_of_memory(called, "batch_size"):
            history = fit(
                model, **fit_arguments(arm, dataset, settings, seed, pool), checkpoint=checkpoint, name=called
            )
        return model.state_dict(), {"history": history}

    return resumable(settings.run_folder / "students", _file_name(arm, seed), key, make)


def _train_student(arm: Method, dataset: Dataset, settings: Settings, seed: int, pool: Pool | None) -> StudentRun:
    trained = fit_student(arm, dataset, settings, seed, pool)

    def make_logits() -> tuple[dict[str, Tensor], dict]:
        model = student_network(trained.tensors).to(settings.device)
        with lower_if_out_of_memory(f"{_called(arm, seed)}: logits", "train_size or test_size"):
            images = {part: normalise(getattr(dataset, part).images) for part in ("train", "val", "test")}
            return {part: predict(model, x, settings.precision) for part, x in images.items()}, {}

    logits_key = {"what": "student's logits", "student": trained.fingerprint, "data": dataset.checksum}
    name = f"{_file_name(arm, seed)}-logits"
    found = cached(settings.run_folder / "students", name, logits_key, make_logits).tensors
    logits = {part: tensor.to(settings.device) for part, tensor in found.items()}
    return StudentRun(
        arm.name, arm.teacher_names, seed, trained.facts["history"], logits, trained.tensors, trained.seconds,
        trained.fingerprint,
    )  # fmt: skip


def fit_arguments(
    arm: Method, dataset: Dataset, settings: Settings, seed: int, pool: Pool | None = None
) -> dict[str, Any]:
    """What `fit` is given to train the student of an arm and seed, but for the network and where it is kept."""
    pixels: Callable[[Tensor, Tensor], Tensor]
    if pool is None:
        viewed = make_views(dataset.train.images, **settings.views)
        labels, num_views, pixels = dataset.train.labels, len(viewed.table), functools.partial(view_pixels, viewed)
    else:
        labels, num_views, pixels = pool.labels, pool.num_views, pool.pixels
    target = _target(arm, labels, seed)
    if target is not None and target.shape[:2] != (len(labels), num_views):
        raise UserError(
            f"arm {arm.name}: the teachers' logits are for {target.shape[0]:,} images in {target.shape[1]} views, the "
            f"student's are {len(labels):,} in {num_views}; let the teachers label the same images (teachers.teach)"
        )

    def loss(logits: Tensor, index: Tensor, view: Tensor) -> Tensor:
        if target is None:
            return arm.loss(logits, labels[index])
        return arm.loss(logits, target[index, view], labels[index])

    return {
        "inputs": lambda index, view: normalise(pixels(index, view)), "labels": labels, "loss": loss,
        "recipe": student_recipe(settings), "num_views": num_views, "seed": seed,
        "validation": (normalise(dataset.val.images), dataset.val.labels), "precision": settings.precision,
    }  # fmt: skip


def as_teacher(students: Sequence[StudentRun], dataset: Dataset, settings: Settings) -> Teacher:
    """Trained students as the teacher of others (Furlanello et al. 2018, arXiv:1805.04770): `view_logits` float16
    [N, V, C] of the training images, which are kept with the students.

    With the seeds 0, 1, ... every student learns from the next one, the last from the first: from other initial weights
    and another order than its own.
    """
    viewed = make_views(dataset.train.images, **settings.views)
    index = torch.arange(len(dataset.train.labels), device=dataset.train.images.device)

    def label(student: StudentRun) -> tuple[dict[str, Tensor], dict]:
        network = student.network().to(settings.device)
        logits = [
            predict(network, normalise(view_pixels(viewed, index, torch.full_like(index, view))), settings.precision)
            for view in range(len(viewed.table))
        ]
        return {"logits": torch.stack(logits, dim=1).half()}, {}

    runs = []
    for student in (*students[1:], *students[:1]):
        key = {
            "what": "student's logits of every view", "student": student.fingerprint,
            "data": dataset.part_checksums["train"], "views": settings.views, "precision": settings.precision,
        }  # fmt: skip
        name = f"{student.arm}-seed{student.seed}-views"
        found = cached(settings.run_folder / "students", name, key, functools.partial(label, student))
        runs.append(TeacherRun(
            "student", "all", student.seed, student.history, student.logits,
            found.tensors["logits"].to(settings.device), student.seconds, found.fingerprint,
        ))  # fmt: skip
    parameters = sum(tensor.numel() for tensor in students[0].state.values())
    return Teacher(
        "student", "all", runs, description="students from scratch", is_standin=False, checksum=runs[0].fingerprint,
        parameters_total=parameters, parameters_trained=parameters, views_trained=len(viewed.table),
        feature_seconds=0.0,
    )  # fmt: skip


def student_network(state: dict[str, Tensor]) -> SmallCNN:
    model = SmallCNN(state["fc2.bias"].numel())
    model.load_state_dict(state)
    return memory_format(model).eval()


def _target(arm: Method, labels: Tensor, seed: int) -> Tensor | None:
    """The logits float32 [N, V, C] that the student of this seed learns from."""
    if not arm.teachers:
        return None
    logits = [teacher.run_for(seed).view_logits.float() for teacher in arm.teachers]
    if arm.combine is None:
        return logits[0]
    return arm.combine(logits, labels=labels[:, None].expand(logits[0].shape[:2]))
