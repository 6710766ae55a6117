"""Students: a method is a loss and its teachers; every method trains the same network in the same way."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdutils.cache import (
    Cached,
    Checkpoint,
    History,
    cache_path,
    cached,
    describe,
    lower_if_out_of_memory,
    resumable,
    source_of,
    tensor_checksum,
)
from kdutils.data.images import Dataset, Split
from kdutils.data.views import make_views, view_pixels, view_table
from kdutils.losses import (
    combine_teachers,
    cross_entropy,
    dist_distillation_loss,
    distillation_loss,
    dkd_distillation_loss,
    standardised_distillation_loss,
)
from kdutils.models import SmallCNN, normalise
from kdutils.parallel import side_by_side
from kdutils.progress import TrainingProgress
from kdutils.settings import Settings, UserError
from kdutils.teachers import Teacher, soft_labels
from kdutils.training import Recipe, channels_last, fit, predict
from kdutils.weights import file_stem, seeded


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train the student.

    - loss, without teachers: `loss(student_logits, labels)`
    - loss, with teachers: `loss(student_logits, teacher_logits, labels)`
    - combine, for two or more teachers: `combine(list_of_logits, labels=labels)` makes one target of their logits

    Bind other parameters by name with `functools.partial`.
    """

    name: str
    loss: Callable[..., Tensor]
    teachers: tuple[Teacher, ...] = ()
    combine: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.teachers) > 1 and self.combine is None:
            raise UserError(
                f"method {self.name}: two or more teachers need `combine`; give a function, such as "
                "partial(combine_teachers, rule='mean_prob', temperature=4.0)"
            )
        if self.combine is not None and not self.teachers:
            raise UserError(f"method {self.name}: `combine` needs teachers; give some, or leave it out")
        wanted = ("student_logits", "teacher_logits", "labels") if self.teachers else ("student_logits", "labels")
        try:
            inspect.signature(self.loss).bind(*wanted)
        except TypeError as error:
            raise UserError(
                f"method {self.name}: the loss cannot be called as loss({', '.join(wanted)}) ({error}); bind its other "
                "parameters by name with functools.partial"
            ) from error

    @property
    def teacher_names(self) -> tuple[str, ...]:
        return tuple(teacher.label for teacher in self.teachers)

    @property
    def words(self) -> str:
        """The method in progress lines and messages: `kd resnet18`."""
        return " ".join((self.name, *self.teacher_names))


@dataclasses.dataclass(frozen=True)
class StudentRun:
    """One trained student. logits: float32 [N, C] of `train`, `val` and `test`, the images as they are (view 0).

    `arm` is the name of the method, which results.csv calls so.
    """

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
    """A loss with its constants; temperature, weight of the soft labels and label smoothing come from the settings."""
    return lambda settings: functools.partial(
        loss,
        temperature=settings.temperature,
        alpha=settings.alpha,
        label_smoothing=settings.kd_label_smoothing,
        **constants,
    )


LOSSES: dict[str, Callable[[Settings], Callable[..., Tensor]]] = {  # name of a method -> settings -> its loss
    "scratch": lambda settings: functools.partial(cross_entropy, label_smoothing=settings.label_smoothing),
    "kd": _distilling(distillation_loss),
    "dkd": _distilling(dkd_distillation_loss, dkd_alpha=1.0, dkd_beta=2.0),
    "dist": _distilling(dist_distillation_loss, dist_beta=2.0, dist_gamma=2.0),
    "kd_standardized": _distilling(standardised_distillation_loss),
}


def named_method(name: str, settings: Settings, teachers: Sequence[Teacher] = (), rule: str = "mean_prob") -> Method:
    """The method called `name` in `LOSSES`, as in the notebooks; `rule` combines two teachers and joins the name."""
    loss = LOSSES[name](settings)
    if len(teachers) < 2:
        return Method(name, loss, tuple(teachers))
    combine = functools.partial(combine_teachers, rule=rule, temperature=settings.temperature)
    return Method(f"{name}_{rule}", loss, tuple(teachers), combine)


def student_recipe(settings: Settings) -> Recipe:
    """The students' training recipe in the settings."""
    return Recipe(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=settings.optimizer,
        schedule=settings.schedule,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )


def train_students(
    method: Method, dataset: Dataset, settings: Settings, train: Split | None = None
) -> list[StudentRun]:
    """Train the student once per seed of the settings, or load what was trained under the same conditions.

    On a CPU, seeds are trained side by side. One seed fixes the initial weights, the order of the images and their
    views, in every method alike. `train`: images to train on in place of the data set's, some of which may have no
    label (-1), such as `dataset.with_unlabelled`. An epoch sees as many of them as the data set has for training: in as
    many epochs, all methods take as many steps.
    """
    places = [_place(method, dataset, settings, seed, train) for seed in settings.seeds]
    if not all(cache_path(*place).exists() for place in places):
        images = dataset.train.images if train is None else train.images
        for teacher in method.teachers:  # once for all seeds, with all threads
            soft_labels(teacher, images, len(view_table(**settings.views)))
    jobs = [functools.partial(_student_run, method, dataset, settings, seed, train) for seed in settings.seeds]
    return side_by_side(jobs, settings.device)


def fit_student(method: Method, dataset: Dataset, settings: Settings, seed: int, train: Split | None = None) -> Cached:
    """Train the student of one seed, or load it: its state dict, and `history` among the facts.

    The test images are not touched.
    """
    called = f"{method.words}, seed {seed}"

    def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict]:
        model = seeded(seed, SmallCNN, len(dataset.classes))
        with lower_if_out_of_memory(called, "batch_size"):
            arguments = fit_arguments(method, dataset, settings, seed, train)
            history = fit(model, **arguments, progress=TrainingProgress(called), checkpoint=checkpoint)
        return model.state_dict(), {"history": history}

    return resumable(*_place(method, dataset, settings, seed, train), make)


def _place(
    method: Method, dataset: Dataset, settings: Settings, seed: int, train: Split | None
) -> tuple[Path, str, dict[str, Any]]:
    """Folder, name and key of a trained student."""
    trained_on = dataset.part_checksums["train"] if train is None else tensor_checksum(train._asdict())[:16]
    usual = len(dataset.train.labels)
    sampled = {} if train is None or len(train.labels) <= usual else {"epoch_size": usual}
    key = {
        "what": "student",
        "network": source_of(SmallCNN),
        "loss": describe(method.loss),
        "combine": describe(method.combine) if method.combine else None,
        "teachers": [teacher.run_for(seed).fingerprint for teacher in method.teachers],
        "data": [trained_on, dataset.part_checksums["val"]],
        "views": settings.views,
        "recipe": dataclasses.asdict(student_recipe(settings)),
        "seed": seed,
        "precision": settings.precision,
        **sampled,
    }
    return settings.run_folder / "students", _file_name(method, seed), key


def fit_arguments(
    method: Method, dataset: Dataset, settings: Settings, seed: int, train: Split | None = None
) -> dict[str, Any]:
    """What `fit` needs to train the student of a method and seed, but for the network and the checkpoint."""
    images, labels = dataset.train if train is None else train
    viewed = make_views(images, **settings.views)
    target = _target(method, images, labels, viewed.table.cpu(), seed)

    def loss(logits: Tensor, index: Tensor, view: Tensor) -> Tensor:
        if target is None:
            return method.loss(logits, labels[index])
        return method.loss(logits, target[index, view], labels[index])

    return {
        "inputs": lambda index, view: normalise(view_pixels(viewed, index, view)),
        "labels": labels,
        "loss": loss,
        "recipe": student_recipe(settings),
        "num_views": len(viewed.table),
        "seed": seed,
        "validation": (normalise(dataset.val.images), dataset.val.labels),
        "epoch_size": len(dataset.train.labels),
        "precision": settings.precision,
    }


def _target(method: Method, images: Tensor, labels: Tensor, table: Tensor, seed: int) -> Tensor | None:
    """The logits float32 [N, V, C] that the student of this seed learns from, in its views `table` [V, 3]."""
    if not method.teachers:
        return None
    logits = []
    for teacher in method.teachers:
        if not torch.equal(teacher.table[: len(table)], table):
            raise UserError(
                f"method {method.name}: {teacher.label} and the student number different views; use the same max_shift "
                "and shift_step for both"
            )
        logits.append(soft_labels(teacher, images, len(table))[teacher.run_number(seed)].float())
    if method.combine is None:
        return logits[0]
    return method.combine(logits, labels=labels[:, None].expand(logits[0].shape[:2]))


def _student_run(method: Method, dataset: Dataset, settings: Settings, seed: int, train: Split | None) -> StudentRun:
    trained = fit_student(method, dataset, settings, seed, train)

    def make_logits() -> tuple[dict[str, Tensor], dict]:
        model = student_network(trained.tensors).to(settings.device)
        with lower_if_out_of_memory(f"{method.words}, seed {seed}: logits", "train_size or test_size"):
            images = {part: normalise(getattr(dataset, part).images) for part in ("train", "val", "test")}
            return {part: predict(model, x, settings.precision) for part, x in images.items()}, {}

    logits_key = {"what": "student's logits", "student": trained.fingerprint, "data": dataset.checksum}
    name = f"{_file_name(method, seed)}-logits"
    found = cached(settings.run_folder / "students", name, logits_key, make_logits).tensors
    return StudentRun(
        arm=method.name,
        teachers=method.teacher_names,
        seed=seed,
        history=trained.facts["history"],
        logits={part: tensor.to(settings.device) for part, tensor in found.items()},
        state=trained.tensors,
        seconds=trained.seconds,
        fingerprint=trained.fingerprint,
    )


def _file_name(method: Method, seed: int) -> str:
    return "-".join([method.name, *map(file_stem, method.teacher_names), f"seed{seed}"])


def student_network(state: dict[str, Tensor]) -> SmallCNN:
    """The student with these weights, in eval mode."""
    model = SmallCNN(state["fc2.bias"].numel())
    model.load_state_dict(state)
    return channels_last(model).eval()
