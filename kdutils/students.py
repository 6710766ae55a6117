"""Students: an arm is a loss and its teachers; every arm is trained by the same `fit`, from paired seeds."""

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable

from torch import Tensor

from kdutils.data import Dataset
from kdutils.models import SmallCNN, normalise, seeded
from kdutils.runs import artefact, artefact_path
from kdutils.settings import Settings, UserError
from kdutils.teachers import Teacher
from kdutils.training import History, Recipe, fit, predict
from kdutils.views import make_views, view_pixels


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train the student.

    loss: `loss(student_logits, labels)` without teachers, `loss(student_logits, teacher_logits, labels)` with;
    bind its parameters with `functools.partial`. combine: for two or more teachers, makes one target of a list of
    their logits: `combine(list_of_logits, labels=labels)`.
    """

    name: str
    loss: Callable[..., Tensor]
    teachers: tuple[Teacher, ...] = ()
    combine: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if (len(self.teachers) > 1) != (self.combine is not None):
            raise UserError(f"arm {self.name}: give `combine` with two or more teachers, and only then")


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

    def network(self) -> SmallCNN:
        """The trained student."""
        model = SmallCNN(self.state["fc2.bias"].numel())
        model.load_state_dict(self.state)
        return model.eval()


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


def train_students(arm: Arm, dataset: Dataset, settings: Settings) -> list[StudentRun]:
    """Train the student once per seed of the settings, or load what was trained under the same conditions.

    One seed fixes the initial weights, the order of the images and their views, in every arm alike.
    """
    return [_train_student(arm, dataset, settings, seed) for seed in settings.seeds]


def _train_student(arm: Arm, dataset: Dataset, settings: Settings, seed: int) -> StudentRun:
    recipe = student_recipe(settings)
    teacher_names = tuple(teacher.arch for teacher in arm.teachers)
    key = {
        "what": "student", "network": _code(SmallCNN), "loss": describe(arm.loss), "combine": describe(arm.combine) if arm.combine else None,
        "teachers": [(t.fingerprint, t.run_for(seed).seed) for t in arm.teachers],
        "data": dataset.checksum, "views": settings.views, "recipe": dataclasses.asdict(recipe), "seed": seed,
        "precision": settings.precision,
    }  # fmt: skip
    folder = settings.run_folder / "students"
    name = "-".join([arm.name, *teacher_names, f"seed{seed}"])
    checkpoint = artefact_path(folder, name, key).with_suffix(".checkpoint")

    def make() -> tuple[dict[str, Tensor], dict]:
        model = seeded(seed, SmallCNN, len(dataset.classes))
        viewed = make_views(dataset.train.images, **settings.views)
        labels = dataset.train.labels
        target = _target(arm, labels, seed)

        def loss(logits: Tensor, index: Tensor, view: Tensor) -> Tensor:
            if target is None:
                return arm.loss(logits, labels[index])
            return arm.loss(logits, target[index, view], labels[index])

        parts = {part: normalise(getattr(dataset, part).images) for part in ("train", "val", "test")}
        history = fit(
            model, lambda index, view: normalise(view_pixels(viewed, index, view)), labels, loss, recipe,
            num_views=len(viewed.table), seed=seed, validation=(parts["val"], dataset.val.labels),
            precision=settings.precision, name=f"{' '.join((arm.name, *teacher_names))}, seed {seed}",
            checkpoint=checkpoint,
        )  # fmt: skip
        logits = {f"logits_{part}": predict(model, x, settings.precision) for part, x in parts.items()}
        return model.state_dict() | logits, {"history": history}

    made = artefact(folder, name, key, make)
    checkpoint.unlink(missing_ok=True)
    logits = {part: made.tensors[f"logits_{part}"].to(settings.device) for part in ("train", "val", "test")}
    state = {name: tensor for name, tensor in made.tensors.items() if not name.startswith("logits_")}
    return StudentRun(arm.name, teacher_names, seed, made.facts["history"], logits, state, made.seconds)


def _target(arm: Arm, labels: Tensor, seed: int) -> Tensor | None:
    """The logits float32 [N, V, C] that the student of this seed learns from."""
    if not arm.teachers:
        return None
    logits = [teacher.run_for(seed).view_logits.float() for teacher in arm.teachers]
    if arm.combine is None:
        return logits[0]
    return arm.combine(logits, labels=labels[:, None].expand(logits[0].shape[:2]))


def describe(function: Callable) -> dict:
    """A function's identity for fingerprints: its code without docstring and comments, and what is bound to it.

    Raises `UserError` for a function whose source cannot be read or that uses variables from around it: a change in
    those would go unnoticed.
    """
    bound: dict[str, str] = {}
    while isinstance(function, functools.partial):
        if function.args:
            raise UserError("loss: bind the parameters of a loss by name: partial(kd_loss, temperature=4.0)")
        bound = {name: repr(value) for name, value in function.keywords.items()} | bound
        function = function.func
    if not inspect.isfunction(function) or inspect.getclosurevars(function).nonlocals or function.__name__ == "<lambda>":
        raise UserError(f"loss: {function!r} must be a plain function (`def`) that uses its arguments alone")
    return {"name": function.__qualname__, "code": _code(function), "bound": dict(sorted(bound.items()))}


def _code(defined: Callable) -> str:
    """The code of a function or class without its docstrings and comments."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(defined)))
    except (OSError, TypeError, SyntaxError) as error:
        raise UserError(f"loss: the source of {defined!r} cannot be read; define it with `def` in a file or cell") from error
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
