"""The students in a run folder: finds them without training anything, and classifies pictures with them."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdutils.cache import read_cached
from kdutils.data.images import read_image
from kdutils.models import SmallCNN, normalise
from kdutils.settings import UserError, shown_path
from kdutils.students import student_network
from kdutils.training import predict

RECORDED = re.compile(r"(?P<arm>\S+)(?P<teachers>( \S+)*), seed (?P<seed>\d+)")  # how `results` names a student
BAR = 40  # characters of a bar of 100 %


class Trained(NamedTuple):
    """A student as the notebooks recorded it. `accuracy`: a fraction of the test images; None where not recorded."""

    arm: str
    teachers: tuple[str, ...]
    seed: int
    fingerprint: str
    path: Path
    classes: list[str]
    data: str
    accuracy: float | None

    @property
    def name(self) -> str:
        """The name of the student's cached result, without its fingerprint."""
        return "-".join([self.arm, *self.teachers, f"seed{self.seed}"])

    @property
    def words(self) -> str:
        """The student in a line for people."""
        teachers = f" from {' and '.join(self.teachers)}" if self.teachers else ""
        accuracy = f"; test accuracy {self.accuracy:.1%}" if self.accuracy is not None else ""
        return f"{self.arm}{teachers}, seed {self.seed}: {self.data}{accuracy}"


def trained_students(folder: Path) -> list[Trained]:
    """The students of the last run in a run folder: those that its notebooks recorded under the same settings.

    Raises `UserError` where there are none.
    """
    paths = sorted((folder / "found").glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    entries = [entry for entry in entries if entry["made_of"]["settings"] == entries[0]["made_of"]["settings"]]
    found: dict[str, Trained] = {}
    for entry in entries:
        data = entry["facts"]["data"]
        for name, fingerprint in entry["made_of"].items():
            if name in found or not (match := RECORDED.fullmatch(name)):
                continue
            arm, teachers, seed = match["arm"], tuple(match["teachers"].split()), int(match["seed"])
            student = Trained(arm, teachers, seed, fingerprint, Path(), data["classes"], data["name"], None)
            rows = [row for e in entries if e["made_of"].get(name) == fingerprint for row in e["rows"]]
            path = folder / "students" / f"{student.name}-{fingerprint}.safetensors"
            found[name] = student._replace(path=path, accuracy=_accuracy(student, rows))
    if not found:
        raise UserError(
            f"student: {shown_path(folder)} holds no trained student; run python -m kdutils run --profile "
            f"{folder.name} first"
        )
    return list(found.values())


def _accuracy(student: Trained, rows: Iterable[dict]) -> float | None:
    wanted = {"arm": student.arm, "teachers": "+".join(student.teachers), "seed": student.seed}
    wanted |= {"split": "test", "metric": "accuracy"}
    return next((float(row["value"]) for row in rows if wanted.items() <= row.items()), None)


def find_student(folder: Path, arm: str, teachers: str | None = None, seed: int | None = None) -> Trained:
    """The trained student of a method. `teachers` (joined by +) and `seed` choose among several.

    Without a seed, the lowest. Raises `UserError` that lists the choices, where none fits or several teachers do.
    """
    students = trained_students(folder)
    wanted = None if teachers is None else sorted(filter(None, teachers.split("+")))
    fitting = [
        student
        for student in students
        if student.arm == arm and wanted in (None, sorted(student.teachers)) and seed in (None, student.seed)
    ]
    if not fitting:
        options = {"arm": arm, "teachers": teachers, "seed": seed}
        asked = " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)
        seeds = ", ".join(str(number) for number in sorted({student.seed for student in students}))
        raise UserError(
            f"student: {shown_path(folder)} holds none for {asked}; use {_listed(students)}, with seed {seeds}"
        )
    if len({student.teachers for student in fitting}) > 1:
        raise UserError(f"student: '{arm}' fits several students; use {_listed(fitting)}")
    return min(fitting, key=lambda student: student.seed)


def _listed(students: Sequence[Trained]) -> str:
    teachers = {(s.arm, s.teachers): f" --teachers {'+'.join(s.teachers)}" if s.teachers else "" for s in students}
    return " or ".join(sorted(f"--arm {arm}{text}" for (arm, _), text in teachers.items()))


def load_student(student: Trained) -> SmallCNN:
    """The network of a trained student. Raises `UserError` for a missing or damaged file, or one of another network."""
    shown = shown_path(student.path)
    if not student.path.is_file():
        raise UserError(f"student: {shown} is missing; run the notebooks again (python -m kdutils run)")
    try:
        return student_network(read_cached(student.path)[1].tensors)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"student: {shown} does not fit today's SmallCNN; run the notebooks again") from error


def read_pictures(paths: Sequence[Path]) -> Tensor:
    """Image files of any size and mode as uint8 [N, 3, 32, 32], resized as the images of a data folder are.

    Raises `UserError` that names the first unreadable image.
    """
    for path in paths:
        if not path.is_file():
            what = "is a folder; name the images in it" if path.is_dir() else "does not exist; check the path"
            raise UserError(f"image: {path} {what}")
    return torch.from_numpy(np.stack([read_image(path) for path in paths])).permute(0, 3, 1, 2).contiguous()


def classify(network: SmallCNN, pictures: Tensor) -> Tensor:
    """Probabilities float32 [N, C] of pictures uint8 [N, 3, 32, 32]."""
    return predict(network, normalise(pictures)).softmax(dim=1)


def prediction_lines(probabilities: Tensor, classes: Sequence[str], top: int) -> list[str]:
    """The `top` most probable classes of one picture, given probabilities [C]: name, per cent and a bar each."""
    width = max(map(len, classes))
    values, order = probabilities.topk(min(top, len(classes)))
    return [
        f"{classes[number]:<{width}}  {value:6.1%}  {'#' * round(BAR * value)}".rstrip()
        for value, number in zip(values.tolist(), order.tolist())
    ]
